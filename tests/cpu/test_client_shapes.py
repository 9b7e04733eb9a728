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


# ------------------------------------------------------------------------------------------------------- Anthropic's


def message(server: Server, status: int = 200, **fields: Any) -> Any:
    answer = post(server, "/v1/messages?beta=true", {"model": "tiny", "max_tokens": 50, "messages": HELLO, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_claude_codes_request(server: Server) -> None:
    """As version 2.1 sends it, but for the texts."""
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "tiny",
        "max_tokens": 32000,
        "stream": True,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, {"type": "text", "text": "hello", **mark}]}
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0; cch=1f3a;"},
            {"type": "text", "text": "You are an agent", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "tools": [
            {"name": "Bash", "description": "runs", "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", **WEATHER}},
            {"name": "late", "input_schema": WEATHER, "defer_loading": True, "eager_input_streaming": True, "allowed_callers": ["direct"]},
        ],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "diagnostics": {"previous_message_id": None},
        "speed": "standard",
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    }
    answer = post(server, "/v1/messages?beta=true", body, authorization="Bearer x", **headers)
    assert answer.status_code == 200, answer.text
    names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    prompt = prompt_of(server)
    assert "You are an agent" in prompt and '"late"' in prompt and "billing" not in prompt  # what changes always would spoil the cache


def test_max_tokens_beyond_the_context_is_what_is_left_of_it(server: Server) -> None:
    server.engine.reply = lambda prompt: "la " * 3000
    answer = message(server, max_tokens=32000)
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["output_tokens"] + len(server.engine.seen[-1][0]) == 2048
    assert message(server, max_tokens=10)["stop_reason"] == "max_tokens"
    error = message(server, 400, messages=[{"role": "user", "content": "x" * 3000}])["error"]
    assert error["message"].startswith("prompt is too long: ") and error["message"].endswith(" tokens > 2047 maximum")


def test_what_is_text_in_another_form(server: Server) -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}, "toolset_name": None}]}
    found = [{"type": "text", "text": "so"}, {"type": "tool_reference", "tool_name": "weather"}]
    blocks = [
        {"type": "tool_result", "tool_use_id": "t", "content": found},
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "a letter"},
            "title": "Letter",
            "citations": {"enabled": False},
        },
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "a page"}]}},
        {"type": "search_result", "source": "https://x", "title": "Found", "content": [{"type": "text", "text": "a hit"}]},
    ]
    message(server, messages=[*HELLO, call, {"role": "user", "content": blocks}])
    for text in ("so\nThe tool weather can be used.", "Letter\na letter", "a page", "Found\nhttps://x\na hit"):
        assert text in prompt_of(server)


def test_anthropics_fields_that_change_nothing(server: Server) -> None:
    format = {"type": "json_schema", "schema": {"type": "object"}}
    message(
        server, fallbacks="default", inference_geo="us", container=None, mcp_servers=[], output_config={"task_budget": {"type": "tokens", "total": 9}}
    )
    message(server, output_format=format, thinking={"type": "disabled"})
    assert server.engine.seen[-1][1].structured_outputs.kind == "json"


def test_what_anthropics_servers_would_do_is_refused_by_name(server: Server) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    for fields, word in (
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers: "),
        ({"container": "c"}, "container: "),
        ({"compaction": {"type": "summarize"}}, "compaction: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: 'web_search_20250305'"),
        ({"messages": [{"role": "user", "content": [image]}]}, "image: the model reads text only"),
        ({"messages": [*HELLO, call, {"role": "user", "content": [result]}]}, "image: the model reads text only"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "aa"}}]}]},
            "document: the model reads",
        ),
    ):
        assert word in message(server, 400, **fields)["error"]["message"]
    error = message(server, 400, thread={"type": "create"})["error"]  # the tool runners of Anthropic's clients try it, and go on without
    assert error["details"]["error_code"] == "thread_unsupported_request"
