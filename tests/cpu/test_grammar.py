"""Structured output: what grammars let through, and the engine under them: with neighbours, overlap, preemption, bad grammars and slow ones."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import tokenizers
from harness import VOCAB, Wanted, make_core, naive, run
from schemas import WRITTEN, Schema, generated

from miniinfer import LLM
from miniinfer.data import Add, SamplingParams, StructuredOutputsParams
from miniinfer.engine import grammar
from miniinfer.engine.grammar import Grammars
from miniinfer.engine.guidance import Backend
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.parsers import Formats
from miniinfer.serve.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat
from miniinfer.serve.tools_grammar import constraint

BUNDLED = Path(grammar.__file__).parents[1] / "assets" / "bundled"
WORDS = 6144 // 32
END = 2


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend(BUNDLED, 6144, [END])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(BUNDLED)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM("bundled", dtype="float32", num_threads=1, max_num_seqs=32, cpu_kv_gib=0.2)
    yield made
    made.core.shutdown()


def want(**given: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**given)


def follow(backend: Backend, tokenizer: Tokenizer, wanted: StructuredOutputsParams, text: str) -> str:
    """Whether a text is a whole output ("yes"), the beginning of one ("more"), or none ("no")."""
    matcher = backend.compile(wanted)
    mask = np.zeros((1, WORDS), dtype=np.int32)
    for token in tokenizer.encode(text, False):
        backend.fill([(matcher, 0)], mask)
        allowed = bool(mask[0, token // 32] >> (token % 32) & 1)
        if not (allowed and matcher.accept(token)):
            return "no"
    backend.fill([(matcher, 0)], mask)
    return "yes" if matcher.finished or mask[0, 0] >> END & 1 else "more"


# ------------------------------------------------------------------------------------------------------------ grammars

GBNF = 'root ::= num ([+*] num)*\nnum ::= [0-9]+ | "(" root ")"'
LARK = 'start: pair ("," pair)*\npair: WORD "=" /[0-9]+/\nWORD: /[a-z]+/'
OLD_TAG = {"structures": [{"begin": "<function=f>", "schema": {"type": "object"}, "end": "</function>"}], "triggers": ["<function="]}


@pytest.mark.parametrize(
    ("wanted", "yes", "no"),
    [
        ({"json": {"type": "object"}}, ['{"a": [1, null]}', "{}"], ["[]", '{"a":  1}', "{a: 1}"]),
        ({"json": '{"type": ["integer", "null"]}'}, ["12", "null"], ['"12"', "1.5"]),
        ({"json": True}, ["[1]", '"x"'], ["x"]),
        ({"json_object": True}, ['{"a": {"b": 1}}'], ["[1]"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":{"b c":[1,2]}}'], ['{"a": 1}', '{"a":1,\n"b":2}', "{ }"]),
        ({"json": '{"type": "array"}', "disable_any_whitespace": True}, ['[1,"a b"]'], ["[1, 2]", "[ ]"]),
        ({"structural_tag": {"format": {"type": "json_schema", "json_schema": {"type": "object", "x-guidance": {"whitespace_flexible": False}}}}},
         ['{"a":1}'], ['{"a": 1}']),
        ({"regex": "^[ab]{2}c?$"}, ["ab", "bac"], ["a$", "abd"]),
        ({"regex": r"cost \$"}, ["cost $"], ["cost \\"]),
        ({"choice": ["red", "green", 'q"\\\n', "größe", "red wine"]}, ["red", "red wine", 'q"\\\n', "größe"], ["blue", "greens"]),
        ({"grammar": GBNF}, ["1+2*(3)"], ["1+", "+1"]),
        ({"grammar": LARK}, ["a=1,bc=22"], ["a=,"]),
        ({"structural_tag": OLD_TAG}, ["hi <function=f>{}</function> ho", "only text"], ["<function=g>", "hi <function=f>[]"]),
        ({"structural_tag": {"format": {"type": "or", "elements": [
            {"type": "regex", "pattern": "a/b+"}, {"type": "tag", "begin": "<x>", "content": {"type": "any_text"}, "end": "</x>"}]}}},
         ["a/bb", "<x>free < text</x>"], ["a/", "<x>open</x> more"]),
    ],
)  # fmt: skip
def test_what_a_grammar_lets_through(backend: Backend, tokenizer: Tokenizer, wanted: dict[str, Any], yes: list[str], no: list[str]) -> None:
    for text in yes:
        assert follow(backend, tokenizer, want(**wanted), text) == "yes", text
    for text in no:
        assert follow(backend, tokenizer, want(**wanted), text) != "yes", text


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": 'root ::= "a'}, "end of input"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {"type": "string"}}}, '["not"]'),
        ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json": {"type": "string", "format": "nonsense"}}, "nonsense"),
        ({"json": False}, "false"),
        ({"structural_tag": {}}, "format"),
        ({"structural_tag": {"format": {"type": "magic"}}}, "magic"),
        ({"structural_tag": {"structures": [{"begin": "<f>", "schema": {}, "end": ""}], "triggers": ["<g"]}}, "<g"),
        ({"structural_tag": {"structures": [{"begin": "<f>"}], "triggers": ["<f"]}}, "schema"),
    ],
)
def test_a_bad_grammar_says_what_is_wrong(backend: Backend, wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        backend.compile(want(**wanted))


def walk(backend: Backend, tokenizer: Tokenizer, schema: Schema, rng: random.Random) -> bytes:
    """An output of tokens drawn evenly from what the masks allow; after a while those that close something are preferred."""
    matcher, out = backend.compile(want(json=schema)), b""
    mask = np.zeros((1, WORDS), dtype=np.int32)
    for step in range(400):
        backend.fill([(matcher, 0)], mask)
        allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
        if END in allowed and (len(allowed) == 1 or step > 40 or rng.random() < 0.3):
            return out
        open_ones = sorted(allowed - {END})
        closing = [i for i in open_ones if tokenizer.token_bytes(i)[:1] in b'"}]'] if step > 40 else []
        token = rng.choice(closing or open_ones)
        assert matcher.accept(token)
        out += tokenizer.token_bytes(token)
        if matcher.finished:
            return out
    raise AssertionError(f"no end: {out[:200]!r}")


def check(schema: Schema, text: str | bytes) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))


def test_whatever_the_masks_allow_validates(backend: Backend, tokenizer: Tokenizer) -> None:
    for number, schema in enumerate([*WRITTEN, *map(generated, range(500))]):
        check(schema, walk(backend, tokenizer, schema, random.Random(number)))


@pytest.mark.parametrize("bounds", [{"exclusiveMinimum": 3, "maximum": 3.875}, {"minimum": -1.25, "exclusiveMaximum": -1}])
def test_exclusive_bounds_are_exclusive(backend: Backend, tokenizer: Tokenizer, bounds: dict[str, float]) -> None:
    for number in range(30):
        check({"type": "number", **bounds}, walk(backend, tokenizer, {"type": "number", **bounds}, random.Random(number)))


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"abcdefghijklmnopqrstuvwxyz", "\u2581", "\u2581ab", '{"', '"}']
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    parts = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence(parts)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    backend, tokenizer = Backend(tmp_path, 320, [2]), Tokenizer.from_folder(tmp_path)
    matcher = backend.compile(want(regex="(ab| ab|é)+!"))
    mask = np.zeros((1, 10), dtype=np.int32)
    backend.fill([(matcher, 0)], mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    assert {tokenizer.token_bytes(i) for i in allowed} == {b"a", b" ", b" ab", "é".encode()[:1]}
    assert all(matcher.accept(pieces.index(p)) for p in ("\u2581ab", "<0xC3>", "<0xA9>", "<0x21>")) and matcher.finished


# --------------------------------------------------------------------------------------------------------------- tools

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "strict": True, "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
JSON_FORMATS = [f for f in TOOL_FORMATS.values() if f.arguments == "json"]


@pytest.mark.parametrize("format", JSON_FORMATS, ids=lambda f: f.name)
def test_tool_calls_in_every_json_format(backend: Backend, tokenizer: Tokenizer, format: Any) -> None:
    def call(name: str, arguments: str, index: int = 0) -> str:
        return f"{format.before}{name}{format.between}{arguments}{format.after}".replace("{index}", str(index))

    def said(text: str, choice: Any, parallel: bool = True) -> str:
        wanted = constraint(None, TOOLS, choice, parallel, Formats(format, None), "")
        return "free" if wanted is None else follow(backend, tokenizer, wanted, text)

    one = format.begin + call("add", '{"a": 1}') + format.end
    two = format.begin + call("add", '{"a": 1}') + format.separator + call("now", "{}", 1) + format.end
    bad = format.begin + call("add", '{"b": 1}') + format.end
    other = format.begin + call("sub", '{"a": 1}') + format.end
    named = {"type": "function", "function": {"name": "add"}}
    assert [said(t, "required") for t in (one, two, bad, other, "hello")] == ["yes", "yes", "no", "no", "no"]
    assert [said(t, "required", parallel=False) for t in (one, two)] == ["yes", "no"]
    assert [said(t, named) for t in (one, two, format.begin + call("now", "{}") + format.end)] == ["yes", "no", "no"]
    if said(one, "auto") != "free":  # the strict tool's arguments
        assert [said(t, "auto") for t in ("Hello.", "Hello. " + two, "Hello. " + bad, "Hello. " + other)] == ["yes", "yes", "no", "no"]


@pytest.mark.parametrize("format", [f for f in TOOL_FORMATS.values() if f.arguments != "json"], ids=lambda f: f.name)
def test_calls_that_cannot_be_forced_are_refused(format: Any) -> None:
    with pytest.raises(ValueError, match="tool_choice: .*cannot be forced"):
        constraint(None, TOOLS, "required", True, Formats(format, None), "")


def test_structure_comes_after_reasoning(backend: Backend, tokenizer: Tokenizer) -> None:
    def said(text: str, prompt: str, tools: list[dict[str, Any]] | None = None) -> str:
        formats = Formats(TOOL_FORMATS["hermes"], REASONING_FORMATS["think"])
        wanted = constraint(want(json={"type": "integer"}), tools or [], None, True, formats, prompt)
        assert wanted is not None
        return follow(backend, tokenizer, wanted, text)

    assert [said(t, "x") for t in ("12", "<think>hm</think>\n\n12", "hm</think>12")] == ["yes", "yes", "no"]
    assert [said(t, "x<think>\n") for t in ("12", "hm 1 < 2</think>\n\n12", "<think>")] == ["more", "yes", "more"]
    assert [said(t, "x<think>\n\n</think>\n\n") for t in ("12", "<think>hm</think>12")] == ["yes", "no"]
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert [said(t, "x", TOOLS) for t in ("12", call, "<think>hm</think>" + call, "text")] == ["yes", "yes", "yes", "no"]


LIMITED = ReasoningFormat("limited", "<tool_response>", "</tool_response>")  # tags that are tokens of the bundled vocabulary
BEGIN, CLOSE = LIMITED.begin, LIMITED.end


@pytest.mark.parametrize(
    ("wanted", "tools", "choice", "answer"),
    [
        (None, [], None, "Hi."),
        (want(json={"type": "integer"}), [], None, "12"),
        (None, TOOLS, None, 'So <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        (None, TOOLS, "required", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
    ],
    ids=["free", "json", "strict", "required"],
)
def test_reasoning_ends_within_its_budget(backend: Backend, tokenizer: Tokenizer, wanted: Any, tools: Any, choice: Any, answer: str) -> None:
    def said(text: str, prompt: str, budget: int) -> str:
        made = constraint(wanted, tools, choice, True, Formats(TOOL_FORMATS["hermes"], LIMITED), prompt, budget)
        return "free" if made is None else follow(backend, tokenizer, made, text)

    assert [len(tokenizer.encode(text, False)) for text in ("!?!", "!?!?")] == [3, 4]
    for prompt, begin in (("x", BEGIN), ("x" + BEGIN + "\n", "")):
        for thought, budget, right in (("!?!", 3, "yes"), ("!?!?", 3, "no"), ("!?!?", 4, "yes"), ("", 3, "yes"), ("", 0, "yes"), ("!?!", 0, "no")):
            assert said(begin + thought + CLOSE + answer, prompt, budget) == right, (prompt, thought, budget)
        assert said(begin + "!?!", prompt, 3) == "more"
        assert said(begin + "!?!" + CLOSE + answer + BEGIN, prompt, 3) == "no"  # once
    assert said(answer, "x", 3) == "yes" and said(answer + BEGIN, "x", 3) == "no"  # without any
    assert said(answer, "x" + BEGIN + CLOSE, 3) in ("yes", "free")  # the prompt has ended it


def test_reasoning_that_cannot_be_limited(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="thinking_token_budget: structured_outputs with a grammar says itself"):
        constraint(want(grammar='start: "x"'), [], None, True, Formats(None, LIMITED), "x", 3)
    assert LIMITED.ids(tokenizer) is not None and LIMITED.ids(None) is None
    assert all(f.ids(tokenizer) is None for f in (REASONING_FORMATS["think"], REASONING_FORMATS["harmony"], ReasoningFormat("", BEGIN, "</x>")))


def test_a_model_stops_thinking(llm: LLM) -> None:
    """It is sampled hot, so it would not by itself; with neighbours of other budgets, and grammars behind."""
    begin, close = (llm.tokenizer.encode(tag, False)[0] for tag in (BEGIN, CLOSE))
    params, budgets = [], [0, 1, 5, 30, 5]
    for i, budget in enumerate(budgets):
        wanted = want(json={"type": "integer"}) if i == 4 else None
        made = constraint(wanted, [], None, True, Formats(None, LIMITED), "x" + BEGIN, budget)
        params.append(SamplingParams(temperature=5.0, seed=i, max_tokens=60, ignore_eos=True, structured_outputs=made, skip_special_tokens=False))
    for out, budget in zip(llm.generate([f"Say {i}" for i in range(5)], params), budgets, strict=True):
        ids = out.outputs[0].token_ids
        assert ids.index(close) <= budget and ids.count(close) == 1 and begin not in ids
    assert re.fullmatch(r"-?\d+", out.outputs[0].text.partition(CLOSE)[2].strip())


# ---------------------------------------------------------------------------------------------------------- the engine


def test_the_models_json_validates(llm: LLM) -> None:
    """Thousands of steps of a real model at high temperature, many grammars in one batch, beside requests without."""
    schemas = [s for s in [*WRITTEN, *map(generated, range(1000, 1030))] if s != {"type": "object"}]
    params = [SamplingParams(max_tokens=120, temperature=1.0, seed=i, structured_outputs=want(json=s)) for i, s in enumerate(schemas)]
    free = [SamplingParams(max_tokens=40, temperature=0.0)] * 2
    outputs = llm.generate(["JSON: "] * (len(schemas) + 2), [*params, *free], use_tqdm=False)
    assert outputs[-1].outputs[0].token_ids == llm.generate("JSON: ", free[0], use_tqdm=False)[0].outputs[0].token_ids
    done = 0
    for schema, output in zip(schemas, outputs, strict=False):
        (sample,) = output.outputs
        assert output.error is None and sample.finish_reason in ("stop", "length"), (schema, output.error)
        if sample.finish_reason == "stop":
            check(schema, sample.text)
            done += 1
    assert done > 0.7 * len(schemas) and sum(len(o.outputs[0].token_ids) for o in outputs) > 1000


def test_samples_choices_and_limits(llm: LLM) -> None:
    colours = ["red", "green", "blue sky"]
    params = [
        SamplingParams(n=3, seed=1, max_tokens=40, structured_outputs=want(regex="[a-z]{3,5}-[0-9]{4}")),
        SamplingParams(max_tokens=40, temperature=2.0, structured_outputs=want(choice=colours), logprobs=2, top_k=50, repetition_penalty=1.2),
        SamplingParams(max_tokens=30, structured_outputs=want(regex="[a-z]*"), ignore_eos=True, temperature=0),
        SamplingParams(max_tokens=30, structured_outputs=want(regex="[a-z ]+"), min_tokens=12, logit_bias={END: 100.0}),
        SamplingParams(max_tokens=30, structured_outputs=want(regex="ab"), min_tokens=12, ignore_eos=True),
        SamplingParams(max_tokens=2, structured_outputs=want(regex="[0-9]{3}"), temperature=0),
    ]
    samples, colour, endless, late, short, cut = llm.generate(["Say: "] * len(params), params, use_tqdm=False)
    assert len({s.text for s in samples.outputs}) == 3
    assert all(re.fullmatch("[a-z]{3,5}-[0-9]{4}", s.text) and s.finish_reason == "stop" for s in samples.outputs)
    assert colour.outputs[0].text in colours and colour.outputs[0].stop_reason is None
    assert len(endless.outputs[0].token_ids) == 30 and endless.outputs[0].finish_reason == "length"
    assert len(late.outputs[0].token_ids) == 13 and late.outputs[0].finish_reason == "stop"  # a bias ends it as soon as min_tokens lets it
    assert (short.outputs[0].text, short.outputs[0].finish_reason) == ("ab", "stop")  # nothing more may follow
    assert len(cut.outputs[0].token_ids) == 2 and cut.outputs[0].finish_reason in ("length", "stop")


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=1, structured_outputs=want(regex="[0-9]{8}"))
    made = llm.generate("Tell me a story.", params, use_tqdm=False)[0]
    ids = made.prompt_token_ids + made.outputs[0].token_ids
    scored = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
    for at, entry in enumerate(made.outputs[0].logprobs or [], len(made.prompt_token_ids)):
        assert abs(entry[ids[at]].logprob - scored[at][ids[at]].logprob) < 1e-3
        assert min(e.logprob for e in entry.values()) < -1  # far from what the model would have said


def some(count: int, **params: Any) -> list[Wanted]:
    """Requests of which every fourth is free."""
    rng = random.Random(2)
    structures = [None, *(want(regex=r) for r in ("([a-h]{1,3}[0-9] )+", "[a-m]{4,40}!", "(0|1)+#"))]
    fields: dict[str, Any] = {"temperature": 0.9, "max_tokens": 20, **params}
    prompts = [[rng.randrange(8, VOCAB) for _ in range(rng.randrange(2, 40))] for _ in range(count)]
    return [Wanted(p, SamplingParams(**fields, seed=i, structured_outputs=structures[i % 4])) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("overlap", [0, 1])
def test_tokens_are_those_of_naive_generation(tmp_path: Path, overlap: int) -> None:
    core = make_core(tmp_path, overlap=overlap, max_num_batched_tokens=32)
    wanted = some(6)
    for got, w in zip(run(core, wanted, stagger=1), wanted, strict=True):
        expected = naive(core, w)
        assert (got.tokens, got.finish) == (expected.tokens, expected.finish)


@pytest.mark.parametrize("overlap", [0, 1])
def test_preempted_outputs_go_on_where_they_were(tmp_path: Path, overlap: int) -> None:
    wanted = [dataclasses.replace(w, params=msgspec.structs.replace(w.params, structured_outputs=want(regex="([a-h]{1,3}[0-9] )+")))
              for w in some(8, max_tokens=60, ignore_eos=True)]  # fmt: skip
    roomy = run(make_core(tmp_path, overlap=overlap), wanted)
    core = make_core(tmp_path, overlap=overlap, num_pages=66)
    assert [g.tokens for g in run(core, wanted)] == [g.tokens for g in roomy]
    assert core.stats()["preemptions"] > 0


def test_an_output_goes_on_in_another_engine(tmp_path: Path) -> None:
    (wanted,) = [w for w in some(2, max_tokens=30, ignore_eos=True) if w.params.structured_outputs]
    wanted.params.structured_outputs = want(regex="([a-h]{1,3}[0-9] )+")
    (whole,) = run(make_core(tmp_path), [wanted])
    core, tokens = make_core(tmp_path), []
    core.add(Add("r", wanted.prompt, wanted.params, output=whole.tokens[:11], seed=wanted.params.seed))
    while core.has_work:
        tokens += [t for u in core.step() for t in u.token_ids]
    assert whole.tokens[:11] + tokens == whole.tokens and len(whole.tokens) == 30


def drain(core: Any, seconds: float = 30.0) -> dict[str, list[Any]]:
    """All updates by sequence, in the order they came."""
    found: dict[str, list[Any]] = {}
    limit = time.monotonic() + seconds
    while core.has_work:
        for update in core.step():
            found.setdefault(update.id, []).append(update)
        core.scheduler.check()
        assert time.monotonic() < limit
    return found


def test_a_bad_grammar_ends_only_its_own_request(tmp_path: Path) -> None:
    core = make_core(tmp_path)
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for k in range(3):
        core.add(Add(f"bad#{k}", [9, 10], SamplingParams(n=3, structured_outputs=want(regex="a(", field="guided_regex")), 0, "bad"))
    core.add(Add("good", [9, 10], plain))
    found = drain(core)
    for k in range(3):
        (end,) = found[f"bad#{k}"]
        assert end.finish_reason == "error" and end.invalid and end.error.startswith("guided_regex: regex: ") and "unclosed" in end.error
    assert sum(len(u.token_ids) for u in found["good"]) == 12
    core.add(Add("bad#0", [9, 10], SamplingParams(structured_outputs=want(regex="a("))))  # the id is free again, the verdict remembered
    assert drain(core)["bad#0"][0].invalid


def test_without_a_tokenizer_structure_is_refused(tmp_path: Path) -> None:
    core = make_core(tmp_path, skip_tokenizer_init=True)
    (update,) = core.add(Add("r", [9], SamplingParams(structured_outputs=want(json_object=True))))
    assert update.invalid and "skip_tokenizer_init" in update.error and not core.has_work


class Slow:
    """A backend that takes its time, and ends the process if it is told to."""

    def __init__(self, real: Backend, seconds: float) -> None:
        self.real, self.seconds, self.compiled = real, seconds, 0

    def compile(self, wanted: StructuredOutputsParams) -> Any:
        self.compiled += 1
        time.sleep(self.seconds)
        return self.real.compile(wanted)

    def fill(self, matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
        self.real.fill(matchers, masks)


def slowly(core: Any, folder: Path, seconds: float) -> Slow:
    slow = Slow(Backend(folder, VOCAB, [7]), seconds)
    core.grammars = Grammars(lambda: slow, None, VOCAB, (7,), 16, pinned=False)
    return slow


def test_a_slow_grammar_holds_up_nobody(tmp_path: Path) -> None:
    core = make_core(tmp_path)
    slow = slowly(core, tmp_path, 0.6)
    begin, first, last = time.monotonic(), {}, {}
    core.add(Add("slow", [9, 10], SamplingParams(max_tokens=5, structured_outputs=want(regex="[a-h]{9}"))))
    core.add(Add("free", [9, 10], SamplingParams(max_tokens=25, temperature=0, ignore_eos=True)))
    core.add(Add("gone", [9, 10], SamplingParams(max_tokens=5, structured_outputs=want(regex="[a-h]{8}"))))
    assert core.abort(["gone"])[0].finish_reason == "abort"
    while core.has_work:
        for update in core.step():
            first.setdefault(update.id, time.monotonic() - begin)
            last[update.id] = time.monotonic() - begin
    assert last["free"] < 0.6 <= first["slow"] and set(last) == {"free", "slow"}
    core.add(Add("again", [9, 10], SamplingParams(max_tokens=5, structured_outputs=want(regex="[a-h]{9}"))))
    assert len(drain(core)["again"]) == 5 and slow.compiled == 2  # it was kept


def test_a_grammar_that_never_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "QUEUE_SECONDS", 0.2)
    core = make_core(tmp_path)
    slowly(core, tmp_path, 1.0)
    core.add(Add("r", [9, 10], SamplingParams(structured_outputs=want(regex="a"))))
    assert "not compiled within" in drain(core)["r"][0].error


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHED_GRAMMARS", 20)
    core = make_core(tmp_path)
    slow = slowly(core, tmp_path, 0)
    for i in range(60):
        core.grammars.start(want(regex=f"a{{{i % 30 + 1}}}"))
    assert len(core.grammars._cache) == len(core.grammars._sizes) == 20
    monkeypatch.setattr(grammar, "CACHED_BYTES", 100)
    core.grammars.start(want(regex="b" * 90))
    assert 1 <= len(core.grammars._cache) < 10 and slow.compiled <= 61


def test_a_matcher_that_breaks_ends_its_request(tmp_path: Path) -> None:
    """A grammar may become too complex in mid-output; nobody else notices."""
    core = make_core(tmp_path)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    core.add(Add("bad", [9, 10], msgspec.structs.replace(params, structured_outputs=want(regex="[a-h]{90}"))))
    core.add(Add("good", [9, 10], params))
    while not (running := [r for r in core.scheduler._running if r.constraint]):
        core.step()
    running[0].constraint.matcher.accept(1)  # a token that does not fit
    found = drain(core)
    assert found["bad"][-1].finish_reason == "error" and found["bad"][-1].error.startswith("structured_outputs: regex: ")
    assert found["good"][-1].finish_reason == "length"


# ------------------------------------------------------------------------------------------------------------- guards


def test_a_guard_dies_instead_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars that overflow a stack, take too long, or too much memory; what follows them is compiled as if nothing had been."""
    guarded = grammar.grammars(lambda: BUNDLED, 6144, (END,), 4, pinned=False)
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'
    late = {"type": "integer", "multipleOf": 9999991}

    def verdict(**wanted: Any) -> str:
        made = guarded.start(want(**wanted))
        while not made.ready:
            guarded.wait(0.1)
        return made.error or "fine"

    assert verdict(regex="a+") == "fine"
    assert "too deeply nested" in verdict(grammar=chain)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.5)
    assert re.search("longer than|too large", verdict(json=late))
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 20)
    assert verdict(json={"type": "object"}) == "fine"
    assert "unclosed" in verdict(regex="a(")
    guarded.shutdown()
