"""Requests exactly as clients send them that are not among the tests' dependencies: agents, frameworks, watchdogs. Raw HTTP over a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer
from miniinfer.serve.response_store import Events

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


def test_several_system_messages_where_the_template_takes_one(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claude Code sends one late, Codex sends two; some models' templates (Qwen 3.5's) refuse that."""
    file, folder = tmp_path / "strict.jinja", save_tokenizer(tmp_path / "tokenizer")
    strict = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}"
    strict += "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    file.write_text(strict)
    monkeypatch.setattr(server.engine, "tokenizer", Tokenizer.from_folder(folder, file))
    talk = [("system", "a"), ("developer", "b"), ("user", "c"), ("system", "d"), ("assistant", "e"), ("system", "f"), ("user", "g")]
    chat(server, messages=[{"role": role, "content": text} for role, text in talk])
    assert prompt_of(server) == "<system>a\n\nb<user>c\n\nd<assistant>e<user>f<user>g"
    file.write_text(strict.replace("'system' and not loop.first", "'system'"))
    monkeypatch.setattr(server.engine, "tokenizer", Tokenizer.from_folder(folder, file))
    error = chat(server, 400, messages=[{"role": "system", "content": "a"}, *HELLO])["error"]
    assert "System message must be at the beginning" in error["message"]


def test_guidances_request(server: Server) -> None:
    """Its vLLM model names a backend for the grammar, and there is one."""
    chat(server, guided_decoding_backend="guidance", guided_grammar='start: "a"')
    assert server.engine.seen[-1][1].structured_outputs.kind == "grammar"


def test_lm_evals_remote_tokenizer(server: Server) -> None:
    """lm-eval asks for these three before it trusts a server with its prompts, and scores token ids with echo."""
    info = httpx.get(server.url + "/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["bos_token"] is None and "im_start" in info["chat_template"]
    ids = post(server, "/tokenize", {"prompt": "hello there", "add_special_tokens": False}).json()["tokens"]
    assert post(server, "/detokenize", {"tokens": ids}).json()["prompt"] == "hello there"
    scored = {"model": "tiny", "prompt": [ids, ids[1:]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for choice, prompt in zip(post(server, "/v1/completions", scored).json()["choices"], (ids, ids[1:]), strict=True):
        values = choice["logprobs"]["token_logprobs"]
        assert values[0] is None and values[1:-1] == [-token / 1000 for token in prompt[1:]]


def test_ollamas_older_embeddings_and_its_version(server: Server) -> None:
    body = {"model": "tiny:latest", "prompt": "hello", "options": {"num_ctx": 2048}, "keep_alive": "5m"}
    (token, *_, last) = server.engine.tokenizer.encode("hello there")
    assert post(server, "/api/embeddings", {**body, "prompt": "hello there"}).json() == {"embedding": [float(last), 2.0, -1.0]} and token
    assert post(server, "/api/embeddings", {**body, "prompt": ""}).json() == {"embedding": []}
    major, minor, _ = httpx.get(server.url + "/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 6)  # VS Code's Copilot asks for 0.6.4


def test_ollamas_suffix(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors complete code with it; the tokenizer must have tokens for the gap."""
    body = {"model": "tiny", "prompt": "def f(", "suffix": "return x", "stream": False}
    assert post(server, "/api/generate", body).json()["error"].startswith("suffix: the model's tokenizer has no tokens")
    assert "insert" not in post(server, "/api/show", {"model": "tiny"}).json()["capabilities"]
    tokens = {"<|fim_prefix|>": 3, "<|fim_suffix|>": 4, "<|fim_middle|>": 5}
    tokenizer = server.engine.tokenizer
    monkeypatch.setattr(tokenizer, "token_id", lambda token, real=tokenizer.token_id: tokens.get(token) or real(token))
    assert post(server, "/api/generate", body).status_code == 200
    ids = server.engine.seen[-1][0]
    assert [ids.index(t) for t in (3, 4, 5)] == [0, 1 + len(tokenizer.encode("def f(", False)), len(ids) - 1]
    assert "insert" in post(server, "/api/show", {"model": "tiny"}).json()["capabilities"]


def test_sglangs_benchmark(server: Server) -> None:
    body = {"text": "hello", "sampling_params": {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True}, "stream": True, "lora_path": None}
    body |= {"return_logprob": False, "logprob_start_len": -1, "image_data": None, "return_routed_experts": False}
    assert post(server, "/generate", body).status_code == 200
    for path in ("/server_info", "/model_info"):
        assert httpx.get(server.url + path).json().keys() == httpx.get(server.url + "/get_" + path[1:]).json().keys()


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


# ------------------------------------------------------------------------------------------------------ Responses API


def response(server: Server, status: int = 200, **fields: Any) -> Any:
    answer = post(server, "/v1/responses", {"model": "tiny", "input": "hello", **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def events_of(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "edits files",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
}
CODEX: Any = [
    {"type": "function", "name": "exec_command", "strict": False, "parameters": WEATHER, "output_schema": {"type": "object"}},
    PATCH,
    {"type": "web_search", "external_web_access": False},
    {"type": "namespace", "name": "mcp__maps__", "description": "maps", "tools": [{"type": "function", "name": "weather", "parameters": WEATHER}]},
]


def test_codex_request(server: Server) -> None:
    """Codex CLI: everything in the request, nothing stored, tools of four kinds."""
    server.engine.reply = lambda prompt: CALL.replace("weather", "mcp__maps__weather")
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]}
    more = {"tool_choice": "auto", "parallel_tool_calls": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "store": False}
    more |= {
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
        "service_tier": "auto",
    }
    asked = {"model": "tiny", "instructions": "be", "input": [developer, user], "tools": CODEX, "stream": True, **more}
    answer = post(server, "/v1/responses", asked, originator="codex_cli_rs", accept="text/event-stream")
    assert answer.status_code == 200, answer.text
    events = events_of(answer.text)
    last = events[-1]["response"]
    assert [tool["type"] for tool in last["tools"]] == ["function", "custom", "namespace"]  # what the model was told of
    (call,) = last["output"]
    assert call["type"] == "function_call" and (call["namespace"], call["name"]) == ("mcp__maps__", "weather")
    prompt = prompt_of(server)
    assert '"mcp__maps__weather"' in prompt and "start: /x/" in prompt and "web_search" not in prompt
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": [{"type": "input_text", "text": "sunny"}]}
    response(server, input=[user, call, result], tools=CODEX, store=False)
    assert '{"name": "mcp__maps__weather"' in prompt_of(server) and "sunny" in prompt_of(server)


def test_a_custom_tool_takes_a_text(server: Server) -> None:
    server.engine.reply = lambda prompt: '<tool_call>{"name": "apply_patch", "arguments": {"input": "*** Begin\\n+é"}}</tool_call>'
    answer = post(server, "/v1/responses", {"input": "hello", "tools": [PATCH], "stream": True})
    events = events_of(answer.text)
    names = [event["type"] for event in events]
    assert names[2:6] == [
        "response.output_item.added",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]
    (call,) = events[-1]["response"]["output"]
    assert call["type"] == "custom_tool_call" and call["name"] == "apply_patch" and call["input"] == "*** Begin\n+é" == events[3]["delta"]
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"}
    response(server, input=[{"role": "user", "content": "x"}, call, result], tools=[PATCH])
    assert '{"input": "*** Begin\\n+é"}' in prompt_of(server) and "done" in prompt_of(server)
    response(server, tools=[PATCH], tool_choice={"type": "custom", "name": "apply_patch"})
    assert "apply_patch" in server.engine.seen[-1][1].structured_outputs.text
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "exec_command"}]}
    response(server, tools=CODEX, tool_choice=choice)
    assert "apply_patch" not in server.engine.seen[-1][1].structured_outputs.text


def test_items_by_reference(server: Server) -> None:
    """The AI SDK sends back the ids of what was stored, not the items."""
    tool = {"type": "function", "name": "weather", "parameters": WEATHER}
    server.engine.reply = lambda prompt: CALL
    (call,) = response(server, tools=[tool])["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    for reference in ({"type": "item_reference", "id": call["id"]}, {"id": call["id"]}):
        response(server, input=[{"role": "user", "content": "x"}, reference, result], tools=[tool])
        assert '{"name": "weather", "arguments": {"city": "Rome"}}' in prompt_of(server)
    lost = {"type": "item_reference", "id": "fc_lost"}
    assert "fc_lost" in response(server, 404, input=[lost])["error"]["message"]


def test_a_stream_in_the_background_can_be_read_again(server: Server) -> None:
    answer = post(server, "/v1/responses", {"input": "hello", "background": True, "stream": True})
    events = events_of(answer.text)
    assert events[0]["type"] == "response.created" and events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    url = f"{server.url}/v1/responses/{events[0]['response']['id']}"
    assert httpx.get(url).json()["status"] == "completed"
    assert httpx.get(url, params={"stream": True}).text == answer.text
    rest = httpx.get(url, params={"stream": "true", "starting_after": 4})
    assert rest.headers["content-type"].startswith("text/event-stream") and events_of(rest.text) == events[5:]
    plain = response(server)["id"]
    refused = httpx.get(f"{server.url}/v1/responses/{plain}?stream=true")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream"


def test_events_are_read_while_they_come() -> None:
    async def follow() -> list[bytes]:
        events, seen = Events(), list[bytes]()

        async def read() -> None:
            async for event in events.read(1):
                seen.append(event)

        events.add(b"a\n\nb\n\n")
        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        events.add(b"c\n\n")
        await asyncio.sleep(0)
        events.end()
        await reader
        return seen

    assert asyncio.run(follow()) == [b"b\n\n", b"c\n\n"]


def test_truncation_drops_the_oldest_turns(server: Server) -> None:
    turns = [[{"role": "user", "content": f"question {i} " + "x" * 300}, {"role": "assistant", "content": f"answer {i}"}] for i in range(9)]
    talk = [{"role": "system", "content": "rules"}, *(message for turn in turns for message in turn), {"role": "user", "content": "last"}]
    assert response(server, 400, input=talk)["error"]["code"] == "context_length_exceeded"
    made = response(server, input=talk, truncation="auto", max_output_tokens=100)
    prompt, tokens = prompt_of(server), len(server.engine.seen[-1][0])
    assert made["truncation"] == "auto" and "rules" in prompt and "last" in prompt and "question 0" not in prompt and "answer 0" not in prompt
    assert 2048 - 100 - 400 < tokens <= 2048 - 100  # no more than it must
    response(server, input=talk[:3], truncation="auto")
    assert "question 0" in prompt_of(server)
    response(server, 400, input=[talk[0], {"role": "user", "content": "x" * 3000}], truncation="auto")


def test_input_tokens_are_counted(server: Server) -> None:
    counted = post(server, "/v1/responses/input_tokens", {"model": "tiny", "input": "hello", "instructions": "be"}).json()
    assert counted["object"] == "response.input_tokens"
    assert counted["input_tokens"] == response(server, instructions="be")["usage"]["input_tokens"]
