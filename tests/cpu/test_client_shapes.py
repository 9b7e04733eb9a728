"""Requests exactly as clients send them that are not among the tests' dependencies: agents, frameworks, watchdogs. Raw HTTP over a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with Server(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """A server over a fresh engine: what a test sets is gone after it."""
    running.engine = running.api.engine = FakeEngine(running.engine.tokenizer, max_model_len=2048)
    return running


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers)


def prompt_of(server: Server) -> str:
    return str(server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False))


def test_head_is_get_without_a_body(server: Server) -> None:
    for path in ("/health", "/v1/models", "/api/version", "/"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and answer.content == b"", path
    assert httpx.head(server.url + "/v1/messages").status_code == 405  # there, but not to be read
    assert httpx.head(server.url + "/nowhere").status_code == 404


def test_models_in_openais_and_anthropics_words(server: Server) -> None:
    listed = httpx.get(server.url + "/v1/models?limit=1000", headers={"anthropic-version": "2023-06-01"}).json()
    assert listed["object"] == "list" and listed["has_more"] is False and listed["first_id"] == listed["last_id"] == "tiny"
    (card,) = listed["data"]
    assert card["object"] == card["type"] == "model" and card["display_name"] == "tiny" and card["created_at"].endswith("Z")
    assert httpx.get(server.url + "/v1/models/tiny").json() == card


def test_errors_carry_a_request_id_in_both_headers(server: Server) -> None:
    answer = post(server, "/v1/messages", {"model": "nope", "max_tokens": 5, "messages": HELLO})
    assert answer.status_code == 404 and answer.headers["request-id"] == answer.headers["x-request-id"] != ""
    answer = post(server, "/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": HELLO})
    assert answer.headers["request-id"] == answer.json()["id"] and len(answer.headers.get_list("request-id")) == 1


TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("weather", "time")]


def chat(server: Server, status: int = 200, **fields: Any) -> Any:
    answer = post(server, "/v1/chat/completions", {"model": "tiny", "messages": HELLO, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_an_assistants_message_comes_back_with_what_routers_add_to_it(server: Server) -> None:
    """LiteLLM's and OpenRouter's users send whole messages back."""
    server.engine.reply = lambda prompt: CALL
    said = chat(server, tools=TOOLS)["choices"][0]["message"]
    added: Any = {
        "provider_specific_fields": {"refusal": None},
        "reasoning_details": [],
        "thinking_blocks": None,
        "function_call": None,
        "audio": None,
    }
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "sunny"}
    chat(server, tools=TOOLS, messages=[*HELLO, {**said, **added}, result])
    assert "sunny" in prompt_of(server)


def test_a_choice_among_some_of_the_tools(server: Server) -> None:
    one = {"type": "function", "function": {"name": "time"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [one]}}
    chat(server, tools=TOOLS, tool_choice=choice)
    params = server.engine.seen[-1][1]
    assert "time" in params.structured_outputs.text and "weather" not in params.structured_outputs.text
    assert '"time"' in prompt_of(server) and '"weather"' not in prompt_of(server)
    choice["allowed_tools"]["mode"] = "auto"
    chat(server, tools=TOOLS, tool_choice=choice)
    assert server.engine.seen[-1][1].structured_outputs is None
    for bad in ({"mode": "none", "tools": [one]}, {"mode": "auto", "tools": []}, {"mode": "auto", "tools": ["auto"]}, None):
        assert chat(server, 400, tools=TOOLS, tool_choice={**choice, "allowed_tools": bad})["error"]["param"] == "tool_choice"
    missing = {"type": "function", "function": {"name": "nothing"}}
    assert (
        "nothing" in chat(server, 400, tools=TOOLS, tool_choice={**choice, "allowed_tools": {"mode": "auto", "tools": [missing]}})["error"]["message"]
    )


def test_a_forced_call_beside_a_format_of_the_text(server: Server) -> None:
    """Instructor and agents name both: the format is for an answer in words, which a forced call is not."""
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "title": "words"}}}
    chat(server, tools=TOOLS, tool_choice="required", response_format=format)
    assert "words" not in server.engine.seen[-1][1].structured_outputs.text
    assert chat(server, 400, tools=TOOLS, tool_choice="required", guided_regex="a")["error"]["param"] == "tool_choice"


def test_refusals_say_what_to_do_instead(server: Server) -> None:
    for fields, word in (
        ({"functions": [{"name": "f"}]}, "tools"),
        ({"function_call": "auto"}, "tool_choice"),
        ({"web_search_options": {"user_location": None}}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "/v1/responses"),
    ):
        error = chat(server, 400, **fields)["error"]
        assert error["param"] == next(iter(fields)) and word in error["message"]


def test_too_long_a_prompt_is_called_that(server: Server) -> None:
    """LiteLLM, agents and editors know by these words that they have to shorten the conversation."""
    error = chat(server, 400, messages=[{"role": "user", "content": "x" * 3000}])["error"]
    assert error["code"] == "context_length_exceeded" and error["message"].startswith("this model's maximum context length is 2048 tokens")
