"""Reasoning and tool calls in chat answers, streamed and whole, through the server; and how they go back into chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_tokenizer import save_tokenizer
from pydantic import BaseModel
from serve_fake import FakeEngine, Server, read_events
from tokenizers import AddedToken

from miniinfer.config import ConfigError, EngineConfig, ServerConfig
from miniinfer.engine.text import ChatTemplate, Tokenizer
from miniinfer.serve.launch import serve
from miniinfer.serve.protocol import Message

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "<think>\nHmm, what now?\n</think>\n\n"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(folder), max_model_len=2048)) as running:
        yield running


def post(server: Server, **fields: Any) -> Any:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return read_events(response.content) if fields.get("stream") else response.json()


def streamed(server: Server, **fields: Any) -> tuple[dict[str, Any], str | None]:
    """The message that a stream's deltas add up to, and the finish reason; checks the shape of every delta."""
    message: dict[str, Any] = {}
    finish = None
    for event in post(server, stream=True, **fields):
        (choice,) = event["choices"]
        assert finish is None
        finish, delta = choice["finish_reason"], choice["delta"]
        assert not set(delta) - {"role", "content", "reasoning", "reasoning_content", "tool_calls"}
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"} and call["type"] == "function" and call["function"]["arguments"] == ""
                calls.append(call["function"])
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message, finish


REPLIES: list[tuple[str, dict[str, Any], str]] = [
    ("Hello.", {"content": "Hello."}, "stop"),
    (THOUGHT + "Yes.", {"content": "Yes.", "reasoning": "Hmm, what now?"}, "stop"),
    (THOUGHT + "So: " + CALL, {"content": "So:", "reasoning": "Hmm, what now?", "tool_calls": [("add", '{"a": 1}')]}, "tool_calls"),
    (CALL + "\n" + CALL, {"content": "", "tool_calls": [("add", '{"a": 1}')] * 2}, "tool_calls"),
    (THOUGHT + CALL[:-22], {"content": CALL[:-22], "reasoning": "Hmm, what now?"}, "stop"),
    (CALL + CALL[:-17], {"content": "", "tool_calls": [("add", '{"a": 1}'), ("add", '{"a":')]}, "stop"),
    (THOUGHT[:-11], {"content": "", "reasoning": "Hmm, what now?"}, "stop"),
]


@pytest.mark.parametrize(("reply", "parts", "finish"), REPLIES)
def test_streamed_and_whole_answers_have_the_same_parts(server: Server, reply: str, parts: dict[str, Any], finish: str) -> None:
    server.engine.reply = lambda prompt: reply
    (choice,) = post(server, tools=TOOLS)["choices"]
    message = choice["message"]
    calls = message.pop("tool_calls", [])
    expected = {"content": parts["content"] or (None if calls else "")}
    if "reasoning" in parts:
        expected |= {"reasoning": parts["reasoning"], "reasoning_content": parts["reasoning"]}
    assert message == {"role": "assistant", "refusal": None, **expected} and choice["finish_reason"] == finish
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == parts.get("tool_calls", [])
    assert all(c["type"] == "function" and c["id"].startswith("call_") for c in calls)
    message, ended = streamed(server, tools=TOOLS)
    assert ended == finish and message.get("reasoning") == message.get("reasoning_content") == parts.get("reasoning")
    assert message["content"] == parts["content"]
    assert [(c["name"], c["arguments"]) for c in message.get("tool_calls", [])] == parts.get("tool_calls", [])


def test_cut_by_max_tokens_keeps_its_finish_reason(server: Server) -> None:
    server.engine.reply = lambda prompt: CALL
    for length in (5, 20, 1000):
        (choice,) = post(server, tools=TOOLS, max_tokens=length)["choices"]
        message, finish = streamed(server, tools=TOOLS, max_tokens=length)
        assert finish == choice["finish_reason"] == ("tool_calls" if length == 1000 else "length")
        assert message["content"] == (choice["message"]["content"] or "")


def test_parallel_calls_may_be_unwanted(server: Server) -> None:
    server.engine.reply = lambda prompt: CALL + CALL
    message, finish = streamed(server, tools=TOOLS, parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1 and finish == "tool_calls"
    assert len(post(server, tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1


def test_reasoning_may_be_unwanted(server: Server) -> None:
    server.engine.reply = lambda prompt: THOUGHT + "Yes."
    assert post(server, include_reasoning=False)["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert streamed(server, include_reasoning=False) == ({"content": "Yes."}, "stop")


def test_reasoning_is_switched_off_by_the_template(server: Server) -> None:
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        post(server, **fields)
        assert server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False).endswith("<think></think>")
    post(server, reasoning_effort="low")
    assert not server.engine.tokenizer.decode(server.engine.seen[-1][0]).endswith("</think>")
    assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "reasoning_effort": "vast"}).status_code == 400


def test_parsers_may_be_chosen_and_switched_off(folder: Path) -> None:
    def reply(prompt: str) -> str:
        return '[THINK]Hmm.[/THINK][TOOL_CALLS]add[ARGS]{"a": 1}'

    with Server(FakeEngine(Tokenizer.from_folder(folder), reply), tool_call_parser="mistral", reasoning_parser="mistral") as server:
        message = post(server, tools=TOOLS)["choices"][0]["message"]
        assert message["reasoning"] == "Hmm." and message["tool_calls"][0]["function"]["name"] == "add"
        assert server.engine.seen[-1][1].skip_special_tokens is False
    with Server(FakeEngine(Tokenizer.from_folder(folder), reply), tool_call_parser="none", reasoning_parser="none") as server:
        assert post(server, tools=TOOLS)["choices"][0]["message"]["content"] == reply("")
    for options in ({"tool_call_parser": "x"}, {"reasoning_parser": "x"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: 'x'"):
            serve(EngineConfig(model="none"), ServerConfig(**options))


def test_reasoning_tokens_are_counted(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert "completion_tokens_details" not in _usage(tokenizer, THOUGHT)
    tokenizer._backend.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer = Tokenizer(tokenizer._backend, tokenizer.special_tokens, {n: t.text for n, t in tokenizer.chat_templates.items()})
    thought = len(tokenizer.encode(THOUGHT.rstrip()))
    usage = _usage(tokenizer, THOUGHT + "Yes.")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought} and usage["completion_tokens"] > thought
    assert _usage(tokenizer, "Yes.</think>")["completion_tokens_details"] == {"reasoning_tokens": 0}
    cut = _usage(tokenizer, THOUGHT, max_tokens=5)
    assert cut["completion_tokens_details"] == {"reasoning_tokens": 5}


def _usage(tokenizer: Tokenizer, reply: str, **fields: Any) -> dict[str, Any]:
    """The usage of an answer, which is the same streamed."""
    with Server(FakeEngine(tokenizer, lambda prompt: reply, max_model_len=2048)) as server:
        usage = post(server, **fields)["usage"]
        assert post(server, stream=True, stream_options={"include_usage": True}, **fields)[-1]["usage"] == usage
    return usage


def test_the_official_client_sees_and_sends_it_back(server: Server) -> None:
    server.engine.reply = lambda prompt: THOUGHT + CALL
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion().choices[0].message
    whole = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS).choices[0].message  # type: ignore[arg-type]
    for message in (final, whole):
        assert message.reasoning_content == "Hmm, what now?" and message.tool_calls and message.tool_calls[0].function.arguments == '{"a": 1}'
        sent = [*HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}]
        client.chat.completions.create(model="tiny", messages=sent, tools=TOOLS)  # type: ignore[arg-type]
        assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in server.engine.tokenizer.decode(server.engine.seen[-1][0], False)


def test_what_the_official_client_parsed_may_be_sent_back(server: Server) -> None:
    class Total(BaseModel):
        total: int

    server.engine.reply = lambda prompt: '{"total": 3}'
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    message = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Total).choices[0].message  # type: ignore[arg-type]
    assert message.parsed == Total(total=3)
    client.chat.completions.create(model="tiny", messages=[*HELLO, message, *HELLO])  # type: ignore[list-item]
    assert '{"total": 3}<|im_end|>' in server.engine.tokenizer.decode(server.engine.seen[-1][0], False)


# ----------------------------------------------------------------------------------------------------------- templates

CALLED = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ANSWERS: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [CALLED], "reasoning_content": "Hmm."},
    {"role": "assistant", "tool_calls": [CALLED], "reasoning": "Hmm."},
    {"role": "assistant", "content": "", "tool_calls": [CALLED], "reasoning_content": "Hmm.", "refusal": None},
]
TEMPLATES = {
    "an object": ("{% for c in messages[1].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{{ messages[1].content }}", '{"a": 1}'),
    "its items": ("{% for k, v in messages[1].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
    "text added to text": ("{{ '```json\n' + messages[1]['tool_calls'][0]['function']['arguments'] + '\n```' }}", '```json\n{"a": 1}\n```'),
    "null content": (
        "{% for m in messages %}{% if m['content'] is none %}{{ m['tool_calls'][0]['function']['name'] }}{% endif %}{% endfor %}",
        "add",
    ),
    "text content": ("{{ 'a' + messages[1].content + 'b' }}", "ab"),
    "thinking": ("{{ messages[1].thinking }}{{ messages[0].thinking is defined }}", "Hmm.False"),
    "reasoning": ("{{ messages[1].reasoning_content }}", "Hmm."),
}


@pytest.mark.parametrize("answer", ANSWERS, ids=["null", "absent", "empty"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_go_back_into_templates_of_every_habit(folder: Path, name: str, answer: dict[str, Any]) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_templates["default"] = ChatTemplate(template)
    sent = [*HELLO, answer, {"role": "tool", "tool_call_id": "x", "content": "2"}]
    messages = [Message.model_validate(message).for_template() for message in sent]
    assert tokenizer.render_chat(messages) == expected
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}  # what came is not changed
