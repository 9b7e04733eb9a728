"""Anthropic's API through its official client, over a fake engine: messages, streams event by event, tools, counts, errors."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = 'let me see <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """A server over a fresh engine: what a test sets is gone after it."""
    running.engine = running.api.engine = FakeEngine(running.engine.tokenizer)
    return running


@pytest.fixture
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def prompt_of(server: Server) -> str:
    return server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)


def ask(server: Server, body: Any, path: str = "/v1/messages", headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events; checks that each is framed under its own name."""
    status, raw, headers = ask(server, {"model": "tiny", "max_tokens": 100, "messages": HELLO, "stream": True, **fields})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), raw
    *framed, end = raw.decode().split("\n\n")
    assert end == ""
    found = []
    for event in framed:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_message(server: Server, client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="tiny", max_tokens=100, messages=HELLO, system="Be brief.", metadata={"user_id": "me"})
    (block,) = message.content
    assert block.type == "text" and block.text == "hello there"
    assert message.role == "assistant" and message.model == "tiny" and message.stop_reason == "end_turn" and message.stop_sequence is None
    assert message.id.startswith("msg_") and message._request_id == message.id
    prompt, params, _, _ = server.engine.seen[0]
    assert prompt_of(server) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len(prompt) and message.usage.cache_read_input_tokens == 3
    assert message.usage.output_tokens == len(server.engine.tokenizer.encode("hello there")) + 1
    assert params.max_tokens == 100


def test_settings_reach_the_engine(server: Server, client: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Two."}]
    extra = {"temperature": 0.5, "top_k": 7, "top_p": 0.25}
    message = client.messages.create(model="tiny", max_tokens=50, messages=HELLO, system=system, stop_sequences=["the"], extra_body=extra)
    params = server.engine.seen[0][1]
    assert (params.temperature, params.top_k, params.top_p, params.stop, params.max_tokens) == (0.5, 7, 0.25, ["the"], 50)
    assert "One.\nTwo." in prompt_of(server)
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == "the" and message.content[0].text == "hello "
    assert client.messages.create(model="tiny", max_tokens=2, messages=HELLO).stop_reason == "max_tokens"


def test_events_in_order(server: Server) -> None:
    found = events(server)
    kinds = [event["type"] for event in found]
    deltas = kinds.count("content_block_delta")
    assert kinds == ["message_start", "content_block_start", "ping", *["content_block_delta"] * deltas] + [
        "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip
    start, block = found[0]["message"], found[1]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] > 0 and start["role"] == "assistant"
    assert block == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert deltas > 1 and all(e["delta"]["type"] == "text_delta" and e["index"] == 0 for e in found if e["type"] == "content_block_delta")
    assert "".join(e["delta"]["text"] for e in found if e["type"] == "content_block_delta") == "hello there"
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None} and found[-2]["usage"]["output_tokens"] > 1


def test_events_of_a_call(server: Server) -> None:
    server.engine.reply = lambda prompt: CALLS
    found = events(server, tools=[TOOL])
    started = [e["content_block"] for e in found if e["type"] == "content_block_start"]
    assert [block["type"] for block in started] == ["text", "tool_use"] and started[1]["name"] == "weather" and started[1]["input"] == {}
    assert [e["index"] for e in found if e["type"] in ("content_block_start", "content_block_stop")] == [0, 0, 1, 1]
    pieces = [e["delta"] for e in found if e["type"] == "content_block_delta" and e["index"] == 1]
    assert all(piece["type"] == "input_json_delta" for piece in pieces)
    assert json.loads("".join(piece["partial_json"] for piece in pieces)) == {"city": "Rome"}
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("reply", ["hello there", CALLS, ""])
def test_the_helper_of_streams_gives_the_whole_message(server: Server, client: anthropic.Anthropic, reply: str) -> None:
    server.engine.reply = lambda prompt: reply
    asked: Any = {"model": "tiny", "max_tokens": 100, "messages": HELLO, "tools": [TOOL]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [block.model_dump(exclude={"id"}) for block in whole.content]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens


def test_a_round_trip_with_a_tool(server: Server, client: anthropic.Anthropic) -> None:
    server.engine.reply = lambda prompt: "it is sunny" if "21 degrees" in prompt else CALLS
    first = client.messages.create(model="tiny", max_tokens=100, messages=HELLO, tools=[TOOL], tool_choice={"type": "auto"})
    assert first.stop_reason == "tool_use"
    said, call = first.content
    assert said.type == "text" and said.text == "let me see"
    assert call.type == "tool_use" and call.name == "weather" and call.input == {"city": "Rome"}
    assert '"name": "weather"' in prompt_of(server) and '"parameters"' in prompt_of(server)
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21 degrees"}]}
    thought: Any = {"type": "thinking", "thinking": "hm", "signature": "s"}
    turns: Any = [*HELLO, {"role": "assistant", "content": [thought, *first.content]}, {"role": "user", "content": [result]}]
    second = client.messages.create(model="tiny", max_tokens=100, messages=turns, tools=[TOOL])
    assert second.stop_reason == "end_turn" and second.content[0].text == "it is sunny"
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in prompt_of(server)
    assert "<|im_start|>tool\n21 degrees<|im_end|>" in prompt_of(server)


def test_no_tools_if_none_are_to_be_used(server: Server, client: anthropic.Anthropic) -> None:
    server.engine.reply = lambda prompt: CALLS
    message = client.messages.create(model="tiny", max_tokens=100, messages=HELLO, tools=[TOOL], tool_choice={"type": "none"})
    assert message.stop_reason == "end_turn" and "weather" not in prompt_of(server)


def test_thinking_goes_to_a_template_that_knows_it(server: Server, client: anthropic.Anthropic) -> None:
    client.messages.create(model="tiny", max_tokens=9, messages=HELLO, thinking={"type": "disabled"})
    assert prompt_of(server).endswith("<think></think>")
    client.messages.create(model="tiny", max_tokens=2000 // 10, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt_of(server).endswith("assistant\n")


def test_count_tokens(server: Server, client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": [TOOL]}
    count = client.messages.count_tokens(**asked).input_tokens
    assert not server.engine.seen, "counting computes nothing"
    client.messages.create(max_tokens=5, **asked)
    assert count == len(server.engine.seen[0][0])


def test_async_client(server: Server) -> None:
    server.engine.reply = lambda prompt: CALLS

    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            asked: Any = {"model": "tiny", "max_tokens": 100, "messages": HELLO, "tools": [TOOL]}
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                text = "".join([piece async for piece in stream.text_stream])
                final = await stream.get_final_message()
            assert text == whole.content[0].text == "let me see"
            assert final.content[1].input == whole.content[1].input == {"city": "Rome"}
            raw = [event.type async for event in await client.messages.create(**asked, stream=True)]
            assert raw[0] == "message_start" and raw[-1] == "message_stop"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"bogus": 1}, "bogus"),
        ({"temperature": 1000.0}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "bogus": 1}]}]}, "messages.0.content.0.text.bogus"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, "messages"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_a_bad_field_is_named(server: Server, change: dict[str, Any], named: str) -> None:
    status, raw, _ = ask(server, {"model": "tiny", "max_tokens": 9, "messages": HELLO, **change})
    body = json.loads(raw)
    assert status == 400 and body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(named), body


def test_an_answer_that_the_client_begins(server: Server, client: anthropic.Anthropic) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "I say "}]}]
    message = client.messages.create(model="tiny", max_tokens=9, messages=begun)
    assert [block.text for block in message.content] == ["hello there"]  # type: ignore[union-attr]
    assert prompt_of(server).endswith("<|im_start|>assistant\nI say ")
    assert client.messages.count_tokens(model="tiny", messages=begun).input_tokens == len(server.engine.seen[-1][0])


def test_errors_are_the_clients_own(server: Server, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(model="other", max_tokens=9, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "x" * 1000}])
    status, raw, _ = ask(server, {"model": "tiny", "max_tokens": 9, "messages": HELLO}, headers={"anthropic-version": "newest"})
    assert status == 400 and b"anthropic-version" in raw
    assert ask(server, {"model": "tiny", "max_tokens": 9, "messages": HELLO}, headers={"anthropic-version": "2023-06-01"})[0] == 200


def test_an_engine_that_dies_in_a_stream(server: Server, client: anthropic.Anthropic) -> None:
    server.engine.die_after = 3
    with (
        pytest.raises(anthropic.APIStatusError, match="engine has died"),
        client.messages.stream(model="tiny", max_tokens=50, messages=HELLO) as stream,
    ):
        stream.get_final_message()


def test_the_key(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), api_key="secret-secret-secret") as closed:
        good = anthropic.Anthropic(base_url=closed.url, api_key="secret-secret-secret", max_retries=0)
        assert good.messages.create(model="tiny", max_tokens=9, messages=HELLO).content
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            anthropic.Anthropic(base_url=closed.url, api_key="wrong", max_retries=0).messages.create(model="tiny", max_tokens=9, messages=HELLO)
