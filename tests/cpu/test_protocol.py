"""The server over a fake engine: what it accepts, refuses and answers, byte for byte and through the official client."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server, read_events

from miniinfer import __version__
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.protocol import ApiError, ChatRequest, CompletionRequest, parse

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server over a fresh engine: what a test sets is gone after it."""
    running.engine = running.api.engine = FakeEngine(running.engine.tokenizer)
    yield running
    assert wait_for(lambda: running.api.unfinished == 0 and not running.engine.open)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def wait_for(condition: Any, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def post(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    raw, kind = response.read(), response.headers.get_content_type()
    connection.close()
    return response.status, json.loads(raw) if kind == "application/json" else raw, {k.lower(): v for k, v in response.getheaders()}


def chat(server: Server, **fields: Any) -> Any:
    status, body, _ = post(server, CHAT, {"messages": HELLO, **fields})
    assert status == 200, body
    return read_events(body) if fields.get("stream") else body


def complete(server: Server, **fields: Any) -> Any:
    status, body, _ = post(server, "/v1/completions", {"prompt": "hello", **fields})
    assert status == 200, body
    return read_events(body) if fields.get("stream") else body


# ------------------------------------------------------------------------------------------------------------ answers


def test_chat_whole(server: Server) -> None:
    body = chat(server, model="tiny")
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello there", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0 and choice["logprobs"] is None
    prompt, params, priority, salt = server.engine.seen[0]
    assert server.engine.tokenizer.decode(prompt, skip_special_tokens=False) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert params.max_tokens is None and params.temperature == 1.0 and (priority, salt) == (0, "")
    made = len(server.engine.tokenizer.encode("hello there")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": made,
        "total_tokens": len(prompt) + made,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_chat_stream(server: Server) -> None:
    events = chat(server, stream=True, stream_options={"include_usage": True})
    *chunks, last = events
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    assert {e["system_fingerprint"] for e in events} == {chat(server)["system_fingerprint"]} == {f"miniinfer-{__version__}"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hello there"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(server.engine.tokenizer.encode("hello there")) + 1
    assert all("usage" not in e for e in chat(server, stream=True))


def test_multibyte_text_is_never_cut(server: Server) -> None:
    server.engine.reply = lambda prompt: "naïve 🙂 日本"
    events = chat(server, stream=True)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "naïve 🙂 日本"
    assert chat(server)["choices"][0]["message"]["content"] == "naïve 🙂 日本"


def test_chat_logprobs(server: Server) -> None:
    ids = [*server.engine.tokenizer.encode("hello there"), 2]
    whole = chat(server, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in whole] == [-t / 1000 for t in ids]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(ids)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in whole)
    assert bytes(b for entry in whole[:-1] for b in entry["bytes"]) == b"hello there" and whole[-1]["token"] == "<|im_end|>"
    events = chat(server, logprobs=True, top_logprobs=2, stream=True)
    assert [x for e in events for x in (e["choices"][0]["logprobs"] or {"content": []})["content"]] == whole
    assert chat(server, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat(server, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"][0]["top_logprobs"][2]["logprob"] == -9999.0


def test_n_and_lists_of_prompts_are_prompt_major(server: Server) -> None:
    server.engine.reply = lambda prompt: f"<{prompt}>"
    body = complete(server, prompt=["one", "two", "three"], n=2)
    assert [c["text"] for c in body["choices"]] == ["<one>", "<one>", "<two>", "<two>", "<three>", "<three>"]
    assert [c["index"] for c in body["choices"]] == list(range(6))
    texts = [""] * 6
    for event in complete(server, prompt=["one", "two", "three"], n=2, stream=True):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [c["text"] for c in body["choices"]]
    assert [c["message"]["content"] for c in chat(server, n=3)["choices"]] == [chat(server)["choices"][0]["message"]["content"]] * 3


def test_token_prompts(server: Server) -> None:
    ids = server.engine.tokenizer.encode("hello")
    body = complete(server, prompt=ids, echo=True, return_token_ids=True)
    assert body["choices"][0]["text"] == "hellohello there"
    assert body["choices"][0]["prompt_token_ids"] == ids == server.engine.seen[0][0]
    assert body["choices"][0]["token_ids"] == [*server.engine.tokenizer.encode("hello there"), 2]
    assert len(complete(server, prompt=[ids, ids])["choices"]) == 2


def test_completion_logprobs_and_echo(server: Server) -> None:
    prompt, made = server.engine.tokenizer.encode("hello"), [*server.engine.tokenizer.encode("hello there"), 2]
    choice = complete(server, logprobs=1, echo=True)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hellohello there"
    assert "".join(logprobs["tokens"]) == "hellohello there<|im_end|>"
    assert logprobs["token_logprobs"] == [None, *(-t / 1000 for t in prompt[1:] + made)]
    assert logprobs["top_logprobs"][0] is None and all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    assert all(choice["text"][at:].startswith(token) for at, token in zip(logprobs["text_offset"], logprobs["tokens"][:-1], strict=False))
    assert [next(iter(top)) for top in logprobs["top_logprobs"][1:]] == logprobs["tokens"][1:]
    streamed: dict[str, list[Any]] = {key: [] for key in logprobs}
    text = ""
    for event in complete(server, logprobs=1, echo=True, stream=True):
        text += event["choices"][0]["text"]
        for key, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[key] += values
    assert (text, streamed) == (choice["text"], logprobs)
    assert complete(server, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0].keys() == {server.engine.tokenizer.token_text(made[0])}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_output_scores_the_prompt(server: Server, stream: bool) -> None:
    body = complete(server, max_tokens=0, echo=True, logprobs=1, stream=stream)
    parts = body if stream else [body]
    assert "".join(p["choices"][0]["text"] for p in parts) == "hello"
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert len(parts[0]["choices"][0]["logprobs"]["tokens"]) == len(server.engine.tokenizer.encode("hello"))
    if not stream:
        assert body["usage"]["completion_tokens"] == 0


def test_stop_string_and_length(server: Server) -> None:
    body = chat(server, stop=" the")
    assert body["choices"][0]["message"]["content"] == "hello"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", " the")
    assert complete(server, stop=["x", "re"], include_stop_str_in_output=True)["choices"][0]["text"] == "hello there"
    assert chat(server, max_tokens=9, max_completion_tokens=1)["choices"][0]["finish_reason"] == "length"
    assert chat(server, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in chat(server, stop=" the", stream=True)) == "hello"


def test_every_sampling_field_arrives(server: Server) -> None:
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "seed": -3, "stop": ["zz"], "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 2, "bad_words": ["awful"],
        "skip_special_tokens": False,
    }  # fmt: skip
    chat(server, **fields, logit_bias={"17": -100, "3": 2}, max_tokens=3, priority=4, cache_salt="s", user="u", store=False, metadata={})
    _, params, priority, salt = server.engine.seen[0]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {17: -100, 3: 2} and params.max_tokens == 3 and (priority, salt) == (4, "s")
    complete(server, temperature=None, stop=None, n=None, best_of=None, logprobs=None, stream_options=None)
    assert server.engine.seen[1][1].max_tokens == 16 and server.engine.seen[1][1].temperature == 1.0


def test_checkpoint_defaults_hold_where_the_client_is_silent(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), defaults={"temperature": 0.6, "top_k": 20}) as server:
        chat(server)
        chat(server, temperature=0)
        assert [(p.temperature, p.top_k) for _, p, _, _ in server.engine.seen] == [(0.6, 20), (0, 20)]


# -------------------------------------------------------------------------------------------------------------- tools

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
CALLS = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1.50, "s": "<ü>"}}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>'


def test_tools_reach_the_template_and_calls_come_back(server: Server, client: openai.OpenAI) -> None:
    server.engine.reply = lambda prompt: CALLS
    choice = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS).choices[0]  # type: ignore[arg-type]
    assert '"name": "add"' in server.engine.tokenizer.decode(server.engine.seen[0][0])
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert calls and [(c.function.name, c.function.arguments) for c in calls] == [("add", '{"a": 1.50, "s": "<ü>"}'), ("now", "{}")]
    assert len({c.id for c in calls}) == 2
    back = [*HELLO, choice.message.model_dump(), {"role": "tool", "tool_call_id": calls[0].id, "content": "2"}]
    client.chat.completions.create(model="tiny", messages=back, tools=TOOLS, max_tokens=1)  # type: ignore[arg-type]
    assert '"arguments": {"a": 1.5, "s": "<ü>"}}</tool_call>' in server.engine.tokenizer.decode(server.engine.seen[1][0], False)


def test_tool_calls_in_a_stream(server: Server, client: openai.OpenAI) -> None:
    server.engine.reply = lambda prompt: CALLS
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.content == "Let me see."
    assert final.message.tool_calls and [c.function.name for c in final.message.tool_calls] == ["add", "now"]
    one = chat(server, tools=TOOLS, parallel_tool_calls=False)["choices"][0]
    assert [c["function"]["name"] for c in one["message"]["tool_calls"]] == ["add"]


def test_tools_not_wanted(server: Server) -> None:
    server.engine.reply = lambda prompt: CALLS
    choice = chat(server, tools=TOOLS, tool_choice="none", skip_special_tokens=False)["choices"][0]
    assert choice["message"]["content"] == CALLS and choice["finish_reason"] == "stop"
    assert "Tools:" not in server.engine.tokenizer.decode(server.engine.seen[0][0])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "required"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content", "image_url"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight", "unknown field"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}, "messages.0.tool_calls", "call 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "0 to 100"),
        ({"temperature": float("nan")}, "temperature", "0 to 100"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": True}, "n", "integer"),
        ({"n": 1.5}, "n", "integer"),
        ({"seed": 2**70}, "seed", "64-bit"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "equal to 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most max_tokens"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": 7}, "stop", "list"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "vocabulary"),
        ({"stop_token_ids": [320]}, "stop_token_ids", "vocabulary"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown field"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'json_schema'"),
        ({"response_format": "json_object"}, "response_format", "must be an object"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format", "unknown field 'schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema: must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": 1}}}, "response_format", "name must be of type str"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format", "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}}, "response_format", "unknown field 'scheme'"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "one structure"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_regex": 7}, "guided_regex", "regex"),
        ({"guided_choice": []}, "guided_choice", "non-empty"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "choice"),
        ({"guided_grammar": "x" * 300_000}, "guided_grammar", "262144"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {}}, "structured_outputs", "got none"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs", "unknown field 'backend'"),
        ({"structured_outputs": 3}, "structured_outputs", "must be an object"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "add"}}, "tool_choice", "'required'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "no tool 'sub'"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "no room for guided_regex"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tool 0"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "messages"),
    ],
)  # fmt: skip
def test_a_bad_chat_field_is_named(server: Server, fields: dict[str, Any], param: str, says: str) -> None:
    status, body, _ = post(server, CHAT, {"messages": HELLO, **fields})
    assert status == 400, body
    assert body["error"]["param"] == param and says in body["error"]["message"] and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(param.split(".")[0]) and not server.engine.open


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", "true")),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, ("json", '{"type": "object"}')),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"a": 1}}}}, ("json", '{"a": 1}')),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}, ("structural_tag", '{"format": {"type": "any_text"}}')),
        ({"guided_json": '{"const": "ü"}'}, ("json", '{"const": "ü"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, ("choice", '["a", "b"]')),
        ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"ebnf": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
        ({"grammar": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
        ({"json_schema": {"a": 1}}, ("json", '{"a": 1}')),
        ({"allowed_token_ids": [9, 5, 9]}, ("grammar", "start: <[5,9]>+")),
        ({"structured_outputs": {"json": True, "regex": None}}, ("json", "true")),
        ({"structured_outputs": {"json": {"a": 1}, "disable_any_whitespace": True}},
         ("json", '{"a": 1, "x-guidance": {"whitespace_flexible": false}}')),
    ],
)  # fmt: skip
def test_structure_in_every_spelling(server: Server, fields: dict[str, Any], wanted: tuple[str, str] | None) -> None:
    chat(server, **fields)
    complete(server, **fields)
    after_reasoning, made = (params.structured_outputs for _, params, _, _ in server.engine.seen)
    assert (made and (made.kind, made.text)) == wanted
    assert made is None or after_reasoning.field == made.field == next(iter(fields))
    if made and made.kind not in ("grammar", "structural_tag"):  # this template knows reasoning, which may come first
        first, second = json.loads(after_reasoning.text)["format"]["elements"]
        assert first["elements"][0]["end"] == "</think>" and first["elements"][-1] == second


BAD_PROMPTS: list[Any] = [None, "", [], [""], ["a", ""], [[]], 7, ["a", 1], [1, "a"], [[1], "a"], [[1.5]], [True], {"a": 1}, [320], [-1]]
BAD_FIELDS: dict[str, Any] = {"best_of": 0, "suffix": "x", "logprobs": 21, "echo": "yes", "max_tokens": 0, "min_tokens": -1, "messages": HELLO}


@pytest.mark.parametrize("fields", [*({"prompt": p} for p in BAD_PROMPTS), *({k: v} for k, v in BAD_FIELDS.items())], ids=str)
def test_a_bad_completion_field_is_named(server: Server, fields: dict[str, Any]) -> None:
    status, body, _ = post(server, "/v1/completions", {"prompt": "hello", **fields})
    assert status == 400, body
    assert body["error"]["param"] == next(iter(fields)) and next(iter(fields)) in body["error"]["message"]


HALF_A_PAIR = b'{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800"}'


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b'{"prompt": "\xff\xfe"}', HALF_A_PAIR, b"[" * 100000, b"\x00", b"{}"])
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        status, answer, _ = post(server, path, body)
        assert status == 400 and answer["error"]["message"] and "Traceback" not in answer["error"]["message"]


def test_context_overflow_has_its_code_and_figures(server: Server) -> None:
    for fields, tokens in (({"prompt": [5] * 512}, "512 prompt tokens"), ({"prompt": [5] * 500, "max_tokens": 13}, "500 prompt tokens and 13")):
        status, body, _ = post(server, "/v1/completions", fields)
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        assert tokens in body["error"]["message"] and "512 tokens" in body["error"]["message"]
    assert complete(server, prompt=[5] * 500, max_tokens=12)["usage"]["prompt_tokens"] == 500


def test_what_is_not_there(server: Server) -> None:
    status, body, _ = post(server, CHAT, {"messages": HELLO, "model": "gpt-9"})
    assert status == 404 and body["error"]["code"] == "model_not_found" and "gpt-9" in body["error"]["message"]
    status, body, _ = post(server, "/v1/nothing", {})
    assert status == 404 and "/v1/nothing" in body["error"]["message"]
    status, body, _ = post(server, "/v1/models", {})
    assert status == 405 and body["error"]["type"] == "invalid_request_error"
    assert post(server, CHAT, b"{}", {"content-type": "text/plain"})[0] == 415


def test_without_a_tokenizer_only_token_ids() -> None:
    with Server(FakeEngine(None)) as server:
        assert post(server, CHAT, {"messages": HELLO})[0] == 400
        status, body, _ = post(server, "/v1/completions", {"prompt": "x"})
        assert status == 400 and "token ids" in body["error"]["message"]
        assert complete(server, prompt=[1, 2], logprobs=0, return_token_ids=True)["choices"][0]["token_ids"] == [5, 6, 7]


def test_api_key(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), api_key="sesame") as server:
        for given in ("", "Bearer wrong", "sesame", "Basic sesame", "Bearer sesam\xe9"):
            status, body, _ = post(server, CHAT, {"messages": HELLO}, {"authorization": given})
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert post(server, CHAT, {"messages": HELLO}, {"authorization": "Bearer sesame"})[0] == 200
        assert get(server, "/health")[0] == 200 and get(server, "/v1/models")[0] == 401


def get(server: Server, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


# ------------------------------------------------------------------------------------------------- bodies and sockets


def test_bodies_that_are_too_large_are_not_kept(server: Server) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, body, _ = post(server, CHAT, b" " * (100 << 20))  # declared; http.client itself holds these 100 MiB
    assert status == 413 and "16 MiB" in body["error"]["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", CHAT, chunks(), {"content-type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB: the client's 100 MiB, and little more
    chat(server)


def test_odd_connections_hurt_nobody(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n".encode()
    held = []
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    for data in (b"", b"POST", head, head + b'{"messages": ', tls, b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 1000):
        for half_open in (True, False):
            s = socket.create_connection(("127.0.0.1", server.port))
            s.sendall(data)
            held.append(s) if half_open else s.close()
    chat(server)
    for s in held:
        s.close()


def test_headers_without_end_are_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nx: ")
        with pytest.raises(OSError):
            for _ in range(1000):
                s.sendall(b"y" * 65536)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 60000 + b"\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 200")


def test_a_body_that_never_comes_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniinfer.serve.service._BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{".encode())
        s.settimeout(5)
        assert s.recv(1000).startswith(b"HTTP/1.1 408")


def test_expect_continue_and_pipelining(server: Server) -> None:
    body = json.dumps({"messages": HELLO}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 100")
        s.sendall(body + head.encode() + b"\r\n" + body)
        data = b""
        while data.count(b'"finish_reason"') < 2:
            data += s.recv(65536)
        assert data.count(b"HTTP/1.1 200 OK") == 2


# -------------------------------------------------------------------------------------------- going away, overload, end


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_goes_away_aborts_its_request(server: Server, stream: bool, prompts: int) -> None:
    server.engine.reply, server.engine.delay = lambda prompt: "one two three " * 8, 0.05
    body = json.dumps({"prompt": ["hello"] * prompts, "stream": stream, "max_tokens": 100}).encode()
    s = socket.create_connection(("127.0.0.1", server.port))
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert wait_for(lambda: len(server.engine.open) == prompts)
    if stream:
        s.recv(100)
    s.close()
    assert wait_for(lambda: not server.engine.open and not server.api.unfinished, 1.0) and len(server.engine.aborted) == prompts


def test_a_client_that_goes_away_before_the_first_token(server: Server) -> None:
    server.engine.delay = 5.0
    s = socket.create_connection(("127.0.0.1", server.port))
    body = json.dumps({"prompt": "hello", "stream": True}).encode()
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + b"content-length: %d\r\n\r\n" % len(body) + body)
    assert wait_for(lambda: bool(server.engine.open))
    s.close()
    assert wait_for(lambda: not server.engine.open, 1.0)


def test_overload_and_draining(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), max_waiting=2) as server:
        server.engine.delay = 0.2
        import threading

        first = [threading.Thread(target=lambda: chat(server)) for _ in range(2)]
        for thread in first:
            thread.start()
        assert wait_for(lambda: server.api.unfinished == 2)
        status, body, headers = post(server, CHAT, {"messages": HELLO})
        assert status == 429 and headers["retry-after"] == "1" and body["error"]["type"] == "rate_limit_error"
        for thread in first:
            thread.join()
        assert post(server, "/v1/completions", {"prompt": ["a", "b", "c"]})[0] == 400
        server.api.gate.draining = True
        assert post(server, CHAT, {"messages": HELLO})[0] == 503 and get(server, "/ready")[0] == 503 and get(server, "/live")[0] == 200


@pytest.mark.parametrize("after", [0, 2])
def test_the_engine_dies(tokenizer: Tokenizer, after: int) -> None:
    with Server(FakeEngine(tokenizer)) as server:
        server.engine.die_after = after
        status, body, _ = post(server, CHAT, {"messages": HELLO, "stream": True})
        if after:
            assert status == 200 and read_events(body)[-1]["error"]["message"] == "the engine has died"
        else:
            assert status == 503 and body["error"]["type"] == "server_error"
        assert post(server, CHAT, {"messages": HELLO})[0] == 503 and get(server, "/health")[0] == 503


def test_an_internal_error_shows_nothing_of_itself(server: Server) -> None:
    def broken(prompt: str) -> str:
        raise RuntimeError("secret")

    server.engine.reply = broken
    for stream in (False, True):
        status, body, _ = post(server, CHAT, {"messages": HELLO, "stream": stream})
        assert status == 500 and body["error"]["type"] == "server_error" and "secret" not in json.dumps(body)


def test_aborting_everything_ends_the_streams_with_an_error(server: Server) -> None:
    server.engine.reply, server.engine.delay = lambda prompt: "one two three " * 8, 0.02
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", CHAT, json.dumps({"messages": HELLO, "stream": True}), {"content-type": "application/json"})
    response = connection.getresponse()
    server.uvicorn.servers[0].get_loop().call_soon_threadsafe(server.api.abort_all)
    assert "gave the request up" in read_events(response.read())[-1]["error"]["message"]


# --------------------------------------------------------------------------------------------------- the other routes


def test_models_health_version_metrics(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
    assert [get(server, path)[0] for path in ("/live", "/ready", "/health", "/ping", "/version")] == [200] * 5
    assert post(server, "/ping", {})[0] == 200
    chat(server)
    server.engine.stats = {"running": 3.0}
    text = get(server, "/metrics")[1]
    samples = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}
    assert samples['vllm:num_requests_running{model_name="tiny"}'] == 3
    assert samples['vllm:request_success_total{finished_reason="stop",model_name="tiny"}'] >= 1
    generated, first = (
        samples['vllm:generation_tokens_total{model_name="tiny"}'],
        samples['vllm:time_to_first_token_seconds_count{model_name="tiny"}'],
    )
    assert generated >= first >= 1


def test_a_model_name_with_a_slash(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), model="org/name") as server:
        assert json.loads(get(server, "/v1/models/org/name")[1])["id"] == "org/name"


# ------------------------------------------------------------------------------------------------- the official client


def test_official_client_maps_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)  # type: ignore[arg-type]
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    server.engine.die_after = 1
    with pytest.raises(openai.APIError, match="died"):
        list(client.completions.create(model="tiny", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x")


def test_official_client_streams(server: Server, client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}))  # type: ignore[arg-type]
    for index in (0, 1):
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index) == "hello there"
    assert chunks[-1].usage and chunks[-1].usage.prompt_tokens_details and chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    whole = client.completions.with_raw_response.create(model="tiny", prompt="hello", logprobs=2, extra_body={"top_k": 3})
    assert whole.headers["x-request-id"].startswith("cmpl-") and whole.parse().choices[0].text == "hello there"


def test_parsing_needs_no_server() -> None:
    assert parse(CompletionRequest, b'{"prompt": [1, 2]}').prompt == [[1, 2]]
    parts = b'[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'
    (message,) = parse(ChatRequest, b'{"messages": [{"role": "developer", "content": ' + parts + b"}]}").messages
    assert message.for_template() == {"role": "system", "content": "ab"}
    with pytest.raises(ApiError):
        parse(ChatRequest, b"1")


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, miniinfer.serve.launch; print([m for m in ('torch', 'transformers', 'numpy', 'tqdm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert run.stdout.strip() == "[]"
