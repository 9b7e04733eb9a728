"""Tool call and reasoning parsers: every format's own spelling, that text in pieces gives what it gives whole, calls or not, and gives it early."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from miniinfer.config import ConfigError
from miniinfer.serve.parsers import CallArguments, CallStart, Content, Delta, Formats, OutputParser, Reasoning, choose
from miniinfer.serve.parsers.formats import REASONING_FORMATS, REASONING_PARSERS, TOOL_FORMATS, TOOL_PARSERS


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [
    tool("get_weather", city={"type": "string"}, days={"type": "integer"}, unit={"type": ["string", "null"]}),
    tool("write", path={"type": "string"}, text={"type": "string"}, options={"type": "object"}, force={"type": "boolean"}),
    tool("now"),
]
Parsed = tuple[str, str, list[tuple[str, str]]]  # reasoning, content, calls


def parser(tools: str = "none", reasoning: str = "none", prompt: str = "", parallel: bool = True) -> OutputParser:
    found = choose(tools, reasoning, "", "").parser(prompt, TOOLS if tools != "none" else None, parallel)
    assert found is not None
    return found


def total(deltas: list[Delta]) -> Parsed:
    """What the deltas add up to; checks their order."""
    reasoning, content, calls = "", "", []
    for delta in deltas:
        match delta:
            case Reasoning(text):
                assert text
                reasoning += text
            case Content(text):
                assert text
                content += text
            case CallStart(index, id, name):
                assert index == len(calls) and id
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return reasoning, content, calls


def whole(p: OutputParser, text: str) -> Parsed:
    return total(p.push(text) + p.finish())


def in_pieces(p: OutputParser, text: str, cuts: list[int]) -> Parsed:
    deltas: list[Delta] = []
    places = [0, *sorted({c for c in cuts if 0 < c < len(text)}), len(text)]
    for start, end in zip(places, places[1:], strict=False):
        deltas += p.push(text[start:end])
    return total(deltas + p.finish())


def check(text: str, **how: Any) -> Parsed:
    """The whole text's parse, which must be that of its characters one by one, and of pieces of a few."""
    expected = whole(parser(**how), text)
    for size in (1, 2, 3, 7):
        assert in_pieces(parser(**how), text, list(range(size, len(text), size))) == expected
    check_arguments(expected)
    return expected


def check_arguments(parsed: Parsed) -> None:
    """They are JSON objects, or the beginning of one."""
    for _, arguments in parsed[2]:
        assert not arguments or isinstance(from_json(arguments, allow_partial=True), dict)
        arguments.encode()


# ------------------------------------------------------------------------------------------------- real-looking answers

PARIS, TWO_DAYS = {"city": "Paris"}, {"city": "Paris", "days": 2}
NESTED = {"path": 'a "b"\\c', "text": "x </tool_call> }{ 日本 😀\n\ttab", "options": {"deep": [1, {"y": None}], "e": []}, "force": False}
J = json.dumps
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
DS = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
KIMI = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
HARMONY = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
A = [("get_weather", PARIS)]
AB = [("get_weather", TWO_DAYS), ("now", {})]
N = [("write", NESTED)]

GOOD: list[tuple[str, str, str, list[Any]]] = [  # format, text, content, calls
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {J(PARIS)}}}\n</tool_call>', "", A),
    ("hermes", f'Let me look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {J(TWO_DAYS)}}}\n</tool_call>\n<tool_call>\n'
     '{"name": "now", "arguments": {}}\n</tool_call>\n', "Let me look.", AB),
    ("hermes", f'<tool_call>{{"arguments": {J(NESTED)}, "name": "write"}}</tool_call>', "", N),
    ("hermes", f'<tool_call>{{"name": "write", "arguments": {J(NESTED, ensure_ascii=False)}}}</tool_call> done', " done", N),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {J(J(PARIS))}}}</tool_call>', "", A),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": "a\nb"}}</tool_call>', "", [("write", {"text": "a\nb"})]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {J(PARIS)}}}\n</tool_', "", A),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {J(TWO_DAYS)}</tool_call>\n<tool_call>{{"name": "now"}}</tool_call>', "", AB),
    ("hermes", f'<tool_call>{{"type": "function", "name": "write", "id": 7, "arguments": {J(NESTED)}, "more": [{{}}]}}</tool_call>', "", N),
    ("hermes", f'<tool_call>{{"name": "other", "arguments": {J(NESTED)}}}</tool_call>', "", [("other", NESTED)]),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": "\\ud83d\\ude00 \\ud83d \\udE00x \\d+\t"}}</tool_call>', "",
     [("write", {"text": "😀 \ufffd \ufffdx \\d+\t"})]),
    ("hermes", "a <tool_call> is a tag. b", "a <tool_call> is a tag. b", []),
    ("qwen3_coder", "I'll check.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
     "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "I'll check.", AB),
    ("qwen3_coder", f"<function=write>\n<parameter=path>\n{NESTED['path']}\n</parameter>\n<parameter=text>\n{NESTED['text']}\n</parameter>\n"
     f"<parameter=options>\n{J(NESTED['options'])}\n</parameter>\n<parameter=force>\nFalse\n</parameter>\n</function>", "", N),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n</function>",
     "", [("get_weather", {"city": "12", "unit": None})]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nSt.\n\nJohn's\n\n<parameter=days>\n2\n</function>\n</tool_call>",
     "", [("get_weather", {"city": "St.\n\nJohn's\n", "days": 2})]),
    *(("qwen3_coder", f"<function=get_weather>\n<parameter=unit>\n{text}\n</parameter>\n</function>", "", [("get_weather", {"unit": value})])
      for text, value in {"None": None, "null ": None, "nullable": "nullable", "no": "no", "True": "True", "1": "1", "": "", "[1]": "[1]"}.items()),
    ("llama3", f'{{"name": "get_weather", "parameters": {J(PARIS)}}}', "", A),
    ("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {J(TWO_DAYS)}}}; {{"name": "now", "parameters": {{}}}}', "", AB),
    ("llama3", '<|python_tag|>brave_search.call(query="weather in \\"Paris\\"")', "", [("brave_search", {"query": 'weather in "Paris"'})]),
    ("llama3", "<|python_tag|>import os\nprint(1)", "<|python_tag|>import os\nprint(1)", []),
    ("llama3", '[get_weather(city="Paris", days=2), now()]', "", AB),
    ("llama3", "\n\n[write(path='a \"b\"\\\\c', text=\"x </tool_call> }{ 日本 😀\\n\\ttab\", "
     "options={'deep': [1, {'y': None}], 'e': []}, force=False)]", "", N),
    ("llama3", "<|python_start|>[get_weather(city='Paris')]<|python_end|>", "", A),
    ("llama3", "[1, 2] are numbers", "[1, 2] are numbers", []),
    ("llama3", "[get_weather(city='Paris', days=2,), now()] and on", " and on", AB),
    ("llama3", '{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {J(TWO_DAYS)}}}, {{"name": "now", "arguments": {{}}}}]', "", AB),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{J(TWO_DAYS)}[TOOL_CALLS]now[ARGS]{{}}", "", AB),
    ("mistral", f"Sure. [TOOL_CALLS]write[CALL_ID]abcDEF123[ARGS]{J(NESTED)}", "Sure.", N),
    ("mistral", f"[TOOL_CALLS]get_weather{J(PARIS)}", "", A),
    ("deepseek_v3", DS.format(V3.format("get_weather", J(TWO_DAYS)) + "\n" + V3.format("now", "{}")), "", AB),
    ("deepseek_v3", "Well." + DS.format(V3.format("write", J(NESTED))), "Well.", N),
    ("deepseek_v31", DS.format(V31.format("get_weather", J(TWO_DAYS)) + V31.format("now", "{}")), "", AB),
    ("deepseek_v31", V31.format("write", J(NESTED, ensure_ascii=False)), "", N),
    ("glm45", "One moment.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
     "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "One moment.", AB),
    ("glm45", f"<tool_call>write<arg_key>path</arg_key><arg_value>{NESTED['path']}</arg_value><arg_key>text</arg_key><arg_value>{NESTED['text']}"
     f"</arg_value><arg_key>options</arg_key><arg_value>{J(NESTED['options'])}</arg_value><arg_key>force</arg_key><arg_value>false</arg_value></tool_call>",
     "", N),
    ("kimi_k2", "Looking.<|tool_calls_section_begin|>" + KIMI.format("get_weather", 0, J(TWO_DAYS)) + KIMI.format("now", 1, "{}")
     + "<|tool_calls_section_end|>", "Looking.", AB),
    ("kimi_k2", "<|tool_calls_section_begin|>" + KIMI.format("write", 7, J(NESTED)), "", N),
    ("harmony", "<|channel|>final<|message|>Hello.<|return|>", "Hello.", []),
    ("harmony", HARMONY.format("get_weather", J(PARIS)).removesuffix("<|call|>"), "", A),
    ("harmony", "<|channel|>commentary<|message|>First the weather.<|end|><|start|>assistant" + HARMONY.format("get_weather", J(TWO_DAYS))
     + "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>", "First the weather.", AB),
    ("harmony", HARMONY.format("write", J(NESTED)), "", N),
    ("harmony", HARMONY.format("write", '{"text": "<|call|><|start|>a"}') + "<|return|>", "", [("write", {"text": "<|call|><|start|>a"})]),
    ("harmony", f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{J(PARIS)}<|call|>", "", A),
    ("json", f'{{"name": "get_weather", "arguments": {J(PARIS)}}}', "", A),
    ("json", f'```json\n[{{"name": "get_weather", "arguments": {J(TWO_DAYS)}}}, {{"name": "now", "arguments": {{}}}}]\n```', "", AB),
    ("json", f'{{"name": "get_weather", "parameters": {J(TWO_DAYS)}}}\n'
     '{"type": "function", "function": {"name": "now", "arguments": "{}"}}', "", AB),
    ("json", f'I look:\n\n```json\n  [{{"name": "get_weather", "arguments": {J(TWO_DAYS)}}}, {{"name": "now", "arguments": {{}}}}]\n```\nDone',
     "I look:\nDone", AB),
    ("json", f'As JSON:\n{{"name": "Ann"}}, {{"name": "now", "arguments": {{}}}}\n {{"name": "get_weather", "arguments": {J(PARIS)}}}',
     'As JSON:\n{"name": "Ann"}, {"name": "now", "arguments": {}}', A),
    ("json", '{"answer": 42}', '{"answer": 42}', []),
    ("json", "```python\nprint()\n```", "```python\nprint()\n```", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), GOOD, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_an_answer_is_split_whole_and_in_pieces(name: str, text: str, content: str, calls: list[Any]) -> None:
    _, got, found = check(text, tools=name)
    assert (got, [(n, json.loads(a)) for n, a in found]) == (content, calls)
    p, deltas = parser(name), []
    for at in range(0, len(text), 3):
        deltas += p.push(text[at : at + 3])
        check_arguments(total(deltas))


@pytest.mark.parametrize(("name", "text", "content", "calls"), [g for g in GOOD if g[3]], ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_truncated_answer_loses_nothing(name: str, text: str, content: str, calls: list[Any]) -> None:
    """Cut off anywhere, as by max_tokens: the last call may be the beginning of one, and says so; without calls, all of the text is content."""
    full = whole(parser(name), text)[2]
    for end in range(len(text)):
        p = parser(name)
        _, got, found = check(text[:end], tools=name) if end % 7 == 0 else whole(p, text[:end])
        assert found[:-1] == full[: len(found[:-1])]
        for (function, arguments), (expected, complete) in zip(found[-1:], full[len(found) - 1 :], strict=False):
            assert function == expected and complete.startswith(arguments)
            assert end % 7 == 0 or p.called == (arguments == complete)
        if not found and "harmony" not in name:
            assert got == text[:end]


BROKEN: list[tuple[str, str, str, str]] = [  # format, text, arguments, content
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": "a", }}</tool_call>', '{"text": "a", ', "}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": "say "hi""}}</tool_call>', '{"text": "say "', 'hi""}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": *}}</tool_call>', '{"text": ', "*}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": 1e999}}', '{"text": ', "1e999}}"),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": [1}', '{"text": [1', "}"),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"text": "cut \\ud83d', '{"text": "cut ', ""),
    ("hermes", '<tool_call>{"name": "write", "arguments": {"force": fal', '{"force": fal', ""),
    ("qwen3_coder", "<function=write>\n<parameter=path>\na b\n</parameter>\n</tool_call>", '{"path": "a b"', "</tool_call>"),
    ("qwen3_coder", "<function=write>\n<parameter=text>\na\n</para", '{"text": "a', ""),
    ("glm45", "<tool_call>write<arg_key>path</arg_key><arg_value>a</arg_value><arg_key>force</arg_key><arg_value>tr",
     '{"path": "a"', "<arg_key>force</arg_key><arg_value>tr"),
    ("llama3", "[write(path='a', text=open('x'))]", '{"path": "a"', " text=open('x'))]"),
    ("llama3", "[write(path=" + "[" * 3000 + "]" * 3000 + ")]", "", "path=" + "[" * 3000 + "]" * 3000 + ")]"),
    ("llama3", "[write(path='a', text='b", '{"path": "a"', " text='b"),
    ("llama3", "[write(path='a'), 7]", '{"path": "a"}', ", 7]"),
    ("mistral", '[TOOL_CALLS] [{"name": "write", "arguments": {}}, 7]', "{}", ", 7]"),
    ("harmony", HARMONY.format("write", '{"path": "a" "b"}'), '{"path": "a" ', '"b"}'),
    ("harmony", HARMONY.format("write", '{"path": "a"} so'), '{"path": "a"}', "so"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "arguments", "content"), BROKEN)
def test_arguments_that_break_off_end_as_they_are(name: str, text: str, arguments: str, content: str) -> None:
    """A client was told of the call; what follows the break is content."""
    for cuts in ([], list(range(len(text)))):
        p = parser(name)
        _, got, found = in_pieces(p, text, cuts)
        assert (got.strip(), found) == (content.strip(), [("write", arguments)])
        assert p.called == arguments.endswith("}")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{bad}</tool_call> x",
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        "<tool_call>" * 50,
        '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 10_000,
    ],
    ids=lambda text: text[:50],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert whole(parser("hermes"), text) == ("", text, [])
    assert in_pieces(parser("hermes"), text, list(range(0, len(text), 997))) == ("", text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=a b>\n</function>\n</tool_call>"),
        ("glm45", "<tool_call>{}</tool_call>"),
        ("glm45", "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>"),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS]f[ARGS]{'a': 1}"),
        ("deepseek_v3", DS.format(V3.format("f", "{'a': 1}"))),
        ("deepseek_v31", DS.format(V31.format("f g", "{}"))),
        ("kimi_k2", "<|tool_calls_section_begin|>" + KIMI.format("f", 0, "[]") + "<|tool_calls_section_end|>"),
        ("llama3", "[now(1)]"),
        ("llama3", "[now(a=open('x'))]"),
        ("llama3", "[other(a=1), now()]"),
        ("harmony", HARMONY.format("f", "{oops").removesuffix("<|call|>")),
        ("harmony", "<|channel|>a b c<|message|>x"),
        ("json", '{"name": "other", "arguments": {}}'),
        ("json", "``json {"),
    ],
)
def test_malformed_calls_come_back_as_they_were(name: str, text: str) -> None:
    assert check(text, tools=name) == ("", text, [])


def test_a_long_call_is_not_read_again_with_every_piece() -> None:
    text = '<tool_call>{"name": "write", "arguments": {"text": "' + "word } " * 30_000 + '"}}</tool_call>'
    _, content, calls = in_pieces(parser("hermes"), text, list(range(0, len(text), 4)))
    assert content == "" and calls[0][0] == "write" and len(calls[0][1]) > 200_000


LONG = {
    "path": "/tmp/x",
    "text": 'All work and no play; \u2603 \\ "\n' * 200,
    "options": {"n": list(range(100)), "k": [["abc"] * 9] * 9},
    "force": True,
}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_call_is_seen_while_it_is_written(name: str) -> None:
    """Its name when its arguments begin. Of those no more is held back than may still turn out to be an escape, a word or a tag; where values are not
    written as JSON, one value that is no text; of Python's literals, any value."""
    whole_value = {"json": 0, "qwen_xml": len(J(LONG["options"])), "glm_xml": len(J(LONG["options"])), "python": len(repr(LONG["text"]))}
    calls = [("write", LONG), ("get_weather", TWO_DAYS)]
    text, p, started = written(name, calls), parser(name), 0
    seen: list[Delta] = []
    times = []
    for at, character in enumerate(text):
        deltas = p.push(character)
        seen += deltas
        started += sum(isinstance(delta, CallStart) for delta in deltas)
        if deltas and started == 1:
            times.append(at)
    assert times[0] - text.index("write") <= 60
    assert max(after - before for before, after in zip(times, times[1:], strict=False)) <= whole_value[TOOL_FORMATS[name].arguments] * 9 // 8 + 60
    _, content, found = total(seen + p.finish())
    assert content == "" and [(n, json.loads(a)) for n, a in found] == calls and p.called


def test_only_the_first_call_without_parallel() -> None:
    for name, text, content, calls in GOOD:
        _, got, found = check(text, tools=name, parallel=False)
        assert (got, [n for n, _ in found]) == (content, [n for n, _ in calls[:1]])


def test_ids_are_what_templates_accept() -> None:
    def ids(name: str, text: str) -> list[str]:
        p = parser(name)
        return [d.id for d in p.push(text) + p.finish() if isinstance(d, CallStart)]

    (mistral,) = ids("mistral", "[TOOL_CALLS]now[ARGS]{}")
    assert len(mistral) == 9 and mistral.isalnum()
    assert ids("mistral", "[TOOL_CALLS]now[CALL_ID]abcDEF123[ARGS]{}") == ["abcDEF123"]
    assert ids("kimi_k2", KIMI.format("now", 7, "{}")) == ["functions.now:7"]
    first, second = ids("hermes", '<tool_call>{"name": "now"}</tool_call>' * 2)
    assert first != second and first.startswith("call_")


# ----------------------------------------------------------------------------------------------------------- reasoning

THINK: list[tuple[str, str, str, str, str]] = [  # format, prompt, text, reasoning, content
    ("think", "", "<think>\nHmm, 2 < 3.\n</think>\n\nYes.", "Hmm, 2 < 3.", "Yes."),
    ("think", "...<think>\n", "Hmm.\n\nSo.\n</think>\n\nYes.", "Hmm.\n\nSo.", "Yes."),
    ("think", "<think>\n", "<think>\nHmm.</think>Yes.", "Hmm.", "Yes."),
    ("think", "", "<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("think", "<think>\n\n</think>\n\n", "Yes. <think>", "", "Yes. <think>"),
    ("think", "", "No <think> at the start</think>", "", "No <think> at the start</think>"),
    ("think", "", "<thinking>", "", "<thinking>"),
    ("think", "", "  <thi", "", "  <thi"),
    ("think", "<think>", "cut off \n</thin", "cut off \n</thin", ""),
    ("think", "", "<think>", "", ""),
    ("mistral", "", "[THINK]Hmm.[/THINK]Yes.", "Hmm.", "Yes."),
    ("harmony", "", "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>final<|message|>Yes. ", "Hmm.", "Yes. "),
    ("harmony", "", "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B", "A\nB", ""),
    ("harmony", "", "plain text < > <|", "", "plain text < > <|"),
    ("harmony", "", " to=5 <|end", "", " to=5 <|end"),
    ("harmony", "", " to=x<|channel|>commentary<|message|>y", "", " to=x<|channel|>commentary<|message|>y"),
]


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content"), THINK)
def test_reasoning_is_split_from_the_answer(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    assert check(text, reasoning=name, prompt=prompt) == (reasoning, content, [])


def test_reasoning_then_calls() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = f"<think>\nShould I write {call}? Yes.\n</think>\n\n{call}"
    assert check(text, tools="hermes", reasoning="think") == (f"Should I write {call}? Yes.", "", [("now", "{}")])
    text = "<|channel|>analysis<|message|>Need the time.<|end|><|start|>assistant" + HARMONY.format("now", "{}")
    assert check(text, tools="harmony", reasoning="harmony") == ("Need the time.", "", [("now", "{}")])
    assert check(text, reasoning="harmony")[1:] == ("<|start|>assistant" + HARMONY.format("now", "{}").removesuffix("<|call|>"), [])


# ---------------------------------------------------------------------------------------------------------- properties

TAGS = {name: sorted({f.begin, f.before, f.between, f.after, f.separator, f.end} - {""}) for name, f in TOOL_FORMATS.items()}
SOUP = [*"{}[]()\"'\\,;:\n <|`x1", "get_weather", "now", "é日😀", '{"a": 1}', "None"]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_split_of_any_text_gives_the_same(name: str, data: st.DataObject) -> None:
    """Texts out of the format's own tags and examples, mixed with what may break them."""
    reasoning = data.draw(st.sampled_from(["none", "think", "harmony"] if name == "harmony" else ["none", "think"]))
    examples = [text for n, text, *_ in GOOD if TOOL_FORMATS[name].parser == n or n == name]
    examples += [text[: len(text) // 2] for text in examples] + [t for n, _, t, *_ in THINK if n == reasoning]
    part = st.one_of(st.sampled_from(TAGS[name] + SOUP + ["<think>", "</think>"]), st.sampled_from(examples), st.text(max_size=4))
    text = "".join(data.draw(st.lists(part, max_size=12)))
    cuts = data.draw(st.one_of(st.just(list(range(len(text)))), st.lists(st.integers(0, max(len(text), 1)), max_size=12)))
    how = {"tools": name, "reasoning": reasoning, "prompt": data.draw(st.sampled_from(["", "<think>\n"]))}
    expected = whole(parser(**how), text)
    assert in_pieces(parser(**how), text, cuts) == expected
    check_arguments(expected)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def written(name: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """An answer with these calls, as the format table says that it is spelt."""
    f, texts = TOOL_FORMATS[name], []
    for i, (function, values) in enumerate(calls):
        match f.arguments:
            case "json":
                arguments = json.dumps(values, ensure_ascii=False)
            case "qwen_xml":
                arguments = "".join(f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n" for k, v in values.items())
            case "glm_xml":
                arguments = "".join(
                    f"<arg_key>{k}</arg_key>\n<arg_value>{v if isinstance(v, str) else json.dumps(v)}</arg_value>\n" for k, v in values.items()
                )
            case "python":
                arguments = ", ".join(f"{k}={v!r}" for k, v in values.items())
        texts.append(f.before + function + f.between.replace("{index}", str(i)) + arguments + f.after)
    return f.begin + f.separator.join(texts) + f.end


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_calls_written_by_the_table_are_read_back(name: str, data: st.DataObject) -> None:
    plain = st.text(st.characters(exclude_characters="<>\r", exclude_categories=("Cs",)), max_size=8)
    values = {"city": plain, "days": st.integers()} if "xml" in TOOL_FORMATS[name].arguments else {"city": st.text(max_size=8), "days": VALUES}
    calls = data.draw(st.lists(st.tuples(st.sampled_from(["get_weather", "write"]), st.fixed_dictionaries(values)), min_size=1, max_size=3))
    if TOOL_FORMATS[name].arguments == "python":  # JSON's keys are strings; equal ones of Python need not be
        calls = [(n, {"city": v["city"], "days": json.loads(json.dumps(v["days"]))}) for n, v in calls]
    if name == "qwen3_coder":
        schema_text = {"write": "city"}  # `write` has no such argument: a value there is text only if it is no JSON
        calls = [(n, v) for n, v in calls if n not in schema_text] or [("get_weather", {"city": "x", "days": 1})]
    if name == "glm45":
        calls = [(n, v) for n, v in calls if n == "get_weather"] or [("get_weather", {"city": "x", "days": 1})]
    text = written(name, calls)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=10))
    _, content, found = in_pieces(parser(name), text, cuts)
    assert content == "" and [(n, json.loads(a)) for n, a in found] == calls


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("template", "family", "tools", "reasoning"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}</think>", "qwen3", "hermes", "think"),
        ("<tool_call>\n<function=example_function_name>", "qwen3_moe", "qwen3_coder", None),
        ("<think></think><tool_call>{{ name }}<arg_key>", "glm4_moe", "glm45", "think"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [", "mistral", "mistral_list", None),
        ("[TOOL_CALLS][ARGS][THINK]", "mistral", "mistral", "mistral"),
        ("<|start_header_id|> '\"parameters\": '", "llama", "llama3_json", None),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>\n```json\n", "deepseek_v3", "deepseek_v3", None),
        ("</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3", "deepseek_v31", "think"),
        ("<|tool_calls_section_begin|>", "kimi_k2", "kimi_k2", None),
        ("<|start|>assistant<|channel|>analysis<|message|>", "gpt_oss", "harmony", "harmony"),
        ("", "qwen2", "hermes", None),
        ("", "llama", "llama3_json", None),
        ("", "mixtral", "mistral_list", None),
        ("", "other", "json", None),
    ],
)
def test_auto_reads_the_template(template: str, family: str, tools: str, reasoning: str | None) -> None:
    assert choose("auto", "auto", template, family) == Formats(TOOL_FORMATS[tools], REASONING_FORMATS.get(reasoning or ""))


def test_every_name_is_a_parser_and_others_are_refused() -> None:
    for name in TOOL_PARSERS:
        assert choose(name, "none", "", "").parser("", TOOLS) is not None or name == "none"
    for name in REASONING_PARSERS:
        assert choose("none", name, "", "").parser("", None) is not None or name in ("none", "auto")
    with pytest.raises(ConfigError, match="tool_call_parser: 'x'"):
        choose("x", "auto", "", "")
    with pytest.raises(ConfigError, match="reasoning_parser: 'x'"):
        choose("auto", "x", "", "")
