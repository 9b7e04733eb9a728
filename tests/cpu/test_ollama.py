"""Ollama's API through its official client, over a fake engine: chat, generate, lines of a stream, options, models, errors."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALLS = 'let me see <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
PLAIN = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


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
def client(server: Server) -> ollama.Client:
    return ollama.Client(host=server.url)


def prompt_of(server: Server) -> str:
    return server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)


def ask(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, json.dumps(body), headers or {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def check_figures(server: Server, answer: Any) -> None:
    assert answer["done"] is True and answer["prompt_eval_count"] == len(server.engine.seen[-1][0])
    parts = [answer[name] for name in ("load_duration", "prompt_eval_duration", "eval_duration")]
    assert all(part >= 0 for part in parts) and 0 < sum(parts) <= answer["total_duration"]


def test_chat(server: Server, client: ollama.Client) -> None:
    server.engine.delay = 0.01
    answer = client.chat("tiny", HELLO)
    assert answer.message.role == "assistant" and answer.message.content == "hello there" and answer.model == "tiny"
    assert answer.done_reason == "stop" and prompt_of(server) == PLAIN
    check_figures(server, answer)
    assert answer.eval_count == len(server.engine.tokenizer.encode("hello there")) + 1
    assert answer.eval_duration >= (answer.eval_count - 1) * 0.01e9 and answer.prompt_eval_duration >= 0.01e9
    assert client.chat("tiny:latest", HELLO).message.content == "hello there"


@pytest.mark.parametrize("reply", ["hello there", CALLS])
def test_a_stream_says_the_same(server: Server, client: ollama.Client, reply: str) -> None:
    server.engine.reply = lambda prompt: reply
    whole = client.chat("tiny", HELLO, tools=[TOOL])
    chunks = list(client.chat("tiny", HELLO, tools=[TOOL], stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    calls = [call.function for chunk in chunks for call in chunk.message.tool_calls or ()]
    assert calls == [call.function for call in whole.message.tool_calls or ()]
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) > 2 and chunks[-1].done_reason == whole.done_reason and chunks[-1].eval_count == whole.eval_count
    check_figures(server, chunks[-1])


def test_streams_are_lines_and_the_default(server: Server) -> None:
    status, raw, headers = ask(server, "/api/chat", {"model": "tiny", "messages": HELLO})
    lines = [json.loads(line) for line in raw.decode().splitlines()]
    assert status == 200 and headers["content-type"] == "application/x-ndjson" and len(lines) > 2
    assert "".join(line["message"]["content"] for line in lines) == "hello there"
    assert "done_reason" not in lines[0] and lines[-1]["done_reason"] == "stop"


def test_a_round_trip_with_a_tool(server: Server, client: ollama.Client) -> None:
    server.engine.reply = lambda prompt: "it is sunny" if "21 degrees" in prompt else CALLS
    first = client.chat("tiny", HELLO, tools=[TOOL])
    (call,) = first.message.tool_calls or ()
    assert first.message.content == "let me see" and call.function.name == "weather" and call.function.arguments == {"city": "Rome"}
    second = client.chat("tiny", [*HELLO, first.message, {"role": "tool", "content": "21 degrees", "tool_name": "weather"}], tools=[TOOL])
    assert second.message.content == "it is sunny"
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in prompt_of(server)


def test_generate(server: Server, client: ollama.Client) -> None:
    answer = client.generate("tiny", "hello", system="Be brief.")
    assert answer.response == "hello there" and answer.done_reason == "stop"
    assert prompt_of(server) == "<|im_start|>system\nBe brief.<|im_end|>\n" + PLAIN
    check_figures(server, answer)
    prompt = server.engine.seen[-1][0]
    assert answer.context is not None and answer.context[: len(prompt)] == prompt and len(answer.context) == len(prompt) + answer.eval_count
    client.generate("tiny", "hello", context=answer.context)
    assert server.engine.seen[-1][0][: len(answer.context)] == answer.context and prompt_of(server).endswith(PLAIN)
    assert "".join(chunk.response for chunk in client.generate("tiny", "hello", stream=True)) == "hello there"


def test_raw_is_as_it_is(server: Server, client: ollama.Client) -> None:
    client.generate("tiny", "hello", raw=True)
    assert prompt_of(server) == "hello"


def test_nothing_asked_loads(server: Server, client: ollama.Client) -> None:
    answer = client.generate("tiny")
    assert answer.done and answer.done_reason == "load" and answer.response == ""
    assert client.chat("tiny").message.content == ""
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert not server.engine.seen


def test_options_reach_the_engine(server: Server, client: ollama.Client) -> None:
    options: Any = {"temperature": 0.5, "num_predict": 50, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 5, "stop": ["the"]}
    options |= {"repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "num_ctx": 4096, "mirostat": 0, "typical_p": 1.0}
    answer = client.chat("tiny", HELLO, options=options, keep_alive="5m")
    got = server.engine.seen[0][1]
    assert (got.temperature, got.max_tokens, got.top_k, got.top_p, got.min_p, got.seed, got.stop) == (0.5, 50, 7, 0.25, 0.125, 5, ["the"])
    assert (got.repetition_penalty, got.presence_penalty, got.frequency_penalty) == (1.5, 0.5, -0.5)
    assert answer.message.content == "hello " and answer.done_reason == "stop"
    assert client.chat("tiny", HELLO, options={"num_predict": 2}).done_reason == "length"
    client.chat("tiny", HELLO, options={"num_predict": -1})
    assert server.engine.seen[-1][1].max_tokens is None


def test_formats_reach_the_engine(server: Server, client: ollama.Client) -> None:
    client.chat("tiny", HELLO, format="json")
    wanted = server.engine.seen[-1][1].structured_outputs
    assert wanted is not None and '"type": "object"' in wanted.text and wanted.field == "format"
    client.generate("tiny", "hello", format={"type": "object", "properties": {"a": {"type": "integer"}}})
    wanted = server.engine.seen[-1][1].structured_outputs
    assert wanted is not None and '"properties": {"a": {"type": "integer"}}' in wanted.text


def test_thinking(server: Server, client: ollama.Client) -> None:
    client.chat("tiny", HELLO, think=False)
    assert prompt_of(server).endswith("<think></think>")
    client.chat("tiny", HELLO, think=True)
    assert prompt_of(server) == PLAIN


def test_logprobs(server: Server, client: ollama.Client) -> None:
    answer = client.chat("tiny", HELLO, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None and len(answer.logprobs) == answer.eval_count
    assert answer.logprobs[0].logprob < 0 and len(answer.logprobs[0].top_logprobs or ()) == 2
    streamed = [entry for chunk in client.chat("tiny", HELLO, logprobs=True, top_logprobs=2, stream=True) for entry in chunk.logprobs or ()]
    assert streamed == list(answer.logprobs)


def test_embed(server: Server, client: ollama.Client) -> None:
    answer = client.embed("tiny", ["hello", "there"])
    prompts = [seen[0] for seen in server.engine.seen]
    assert len(answer.embeddings) == 2 and answer.prompt_eval_count == sum(map(len, prompts))
    assert all(sum(x * x for x in vector) == pytest.approx(1) for vector in answer.embeddings)
    assert 0 <= (answer.load_duration or 0) <= (answer.total_duration or 0)
    assert client.embed("tiny", "hello").embeddings == answer.embeddings[:1]
    assert len(client.embed("tiny", "hello", dimensions=2).embeddings[0]) == 2
    assert client.embed("tiny", "hello " * 2000).prompt_eval_count == 512
    with pytest.raises(ollama.ResponseError, match="context"):
        client.embed("tiny", "hello " * 2000, truncate=False)


def test_what_clients_ask_about_models(server: Server, client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "tiny" and len(model.digest or "") == 64 and model.modified_at is not None and model.details is not None
    (active,) = client.ps().models
    assert active.model == "tiny" and active.context_length == 512 and active.digest == model.digest
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools", "thinking"] and "im_start" in (shown.template or "")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/api/version")
    assert json.loads(connection.getresponse().read())["version"]


def test_async_client(server: Server) -> None:
    async def main() -> None:
        client = ollama.AsyncClient(host=server.url)
        whole = await client.chat("tiny", HELLO)
        streamed = [chunk.message.content or "" async for chunk in await client.chat("tiny", HELLO, stream=True)]
        assert "".join(streamed) == whole.message.content == "hello there"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("chat", {"bogus": 1}, "bogus"),
        ("chat", {"options": {"bogus": 1}}, "options.bogus"),
        ("chat", {"options": {"temperature": 1000.0}}, "options.temperature"),
        ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"options": {"num_predict": "9"}}, "options.num_predict"),
        ("chat", {"format": "xml"}, "format"),
        ("chat", {"stream": 1}, "stream"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages.0.images"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("generate", {"prompt": 5}, "prompt"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "context": [-1]}, "prompt"),
        ("show", {"model": None}, "model"),
    ],
)
def test_a_bad_field_is_named(server: Server, path: str, change: dict[str, Any], named: str) -> None:
    fields = {"chat": {"messages": HELLO}}.get(path, {})
    status, raw, _ = ask(server, f"/api/{path}", {"model": "tiny", **fields, **change})
    assert status == 400 and json.loads(raw)["error"].startswith(named), raw


def test_errors(server: Server, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as e:
        client.chat("other", HELLO)
    assert e.value.status_code == 404
    server.engine.die_after = 3
    with pytest.raises(ollama.ResponseError, match="engine has died"):
        list(client.chat("tiny", HELLO, stream=True))


def test_a_content_type_that_is_not_json(server: Server) -> None:
    """curl's own is taken, but not from a page in a browser, which could send it to this server from anywhere."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    asked = {"model": "tiny", "messages": HELLO, "stream": False}
    assert ask(server, "/api/chat", asked, form)[0] == 200
    assert ask(server, "/api/chat", asked, form | {"origin": "https://example.com"})[0] == 415
