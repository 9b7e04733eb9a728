"""Pinned prefixes and retention hints on a real engine with few KV pages: what others' load leaves of them, in cached_tokens, and after kill -9."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from serve_process import ServerProcess, wait_for

PAGE, PAGES = 16, 41  # tokens, and KV pages with page 0
SYSTEM = "you are the quick brown fox; these are the rules: " + " ".join(f"{i} jumps over {i * i};" for i in range(12))


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    place = tmp_path_factory.mktemp("prefixes")
    (place / "rules.json").write_text(json.dumps([{"role": "system", "content": SYSTEM}]))
    options = ["--page-size", str(PAGE), "--num-pages", str(PAGES), "--max-pinned-fraction", "0.5"]
    server = ServerProcess(folder, place / "log", *options, "--pin-prefix", str(place / "rules.json"))
    yield server
    server.close()
    assert "Traceback" not in server.log.read_text()


def ask(server: ServerProcess, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def complete(server: ServerProcess, prompt: list[int], **fields: Any) -> int:
    """How many of a prompt's tokens were cached."""
    status, body = ask(server, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1, **fields})
    assert status == 200, body
    return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])


def chat(server: ServerProcess, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    status, body = ask(server, "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 4, "temperature": 0, **fields})
    assert status == 200, body
    return body  # type: ignore[no-any-return]


def pressure(server: ServerProcess, seed: int, tokens: int = 1500) -> None:
    """Others' prompts, that nobody has sent before, of more tokens than there are pages for."""
    rng = random.Random(seed)
    for _ in range(tokens // 300):
        assert complete(server, [rng.randrange(10, 300) for _ in range(300)]) < PAGE


def one(server: ServerProcess, name: str) -> dict[str, Any]:
    (found,) = [pin for pin in ask(server, "GET", "/v1/prefixes")[1]["data"] if pin["name"] == name]
    return found


def test_a_pinned_system_prompt_is_never_computed_again(running: ServerProcess) -> None:
    pin = one(running, "rules")
    assert pin["pages"] == pin["resident_pages"] == pin["tokens"] // PAGE > 5 and pin["expires_in_seconds"] is None
    assert running.metric("miniinfer_kv_pages_pinned") == pin["pages"]
    for seed in range(3):
        pressure(running, seed)
        usage = chat(running, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"what is rule {seed}?"}])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= pin["pages"] * PAGE
    assert one(running, "rules")["hits"] == 3


def test_pins_come_and_go_by_name(running: ServerProcess) -> None:
    prompt = [random.Random("pin").randrange(10, 300) for _ in range(100)]
    status, made = ask(running, "POST", "/v1/prefixes", {"name": "numbers", "prompt": prompt, "ttl_seconds": 600})
    assert status == 200 and (made["tokens"], made["pages"], made["resident_pages"]) == (100, 6, 6) and 500 < made["expires_in_seconds"] <= 600
    pressure(running, 10)
    assert complete(running, [*prompt, 7]) == 96
    assert ask(running, "POST", "/v1/prefixes", {"name": "numbers", "prompt": prompt})[1]["expires_in_seconds"] is None
    status, error = ask(running, "POST", "/v1/prefixes", {"name": "numbers", "prompt": prompt[:50]})
    assert status == 409 and error["error"]["code"] == "name_in_use"
    status, error = ask(running, "POST", "/v1/prefixes", {"name": "long", "prompt": [5] * 400})
    assert status == 409 and "max_pinned_fraction" in error["error"]["message"]
    assert ask(running, "DELETE", "/v1/prefixes/numbers")[1] == {"id": "numbers", "object": "prefix", "deleted": True}
    assert ask(running, "DELETE", "/v1/prefixes/numbers")[0] == 404
    pressure(running, 11)
    assert complete(running, [*prompt, 7]) < 96
    assert [pin["name"] for pin in ask(running, "GET", "/v1/prefixes")[1]["data"]] == ["rules"]


def test_a_request_as_long_as_the_cache_runs_at_the_cost_of_pins(running: ServerProcess) -> None:
    pin = one(running, "rules")
    assert pin["resident_pages"] == pin["pages"]
    assert complete(running, [random.Random("long").randrange(10, 300) for _ in range(505)]) == 0
    assert one(running, "rules")["resident_pages"] < pin["pages"]
    question = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "and now?"}]
    chat(running, question)
    pressure(running, 20)
    assert chat(running, question)["usage"]["prompt_tokens_details"]["cached_tokens"] >= pin["pages"] * PAGE, "computed again, it is pinned again"


def test_a_conversation_whose_tool_runs_keeps_its_pages(running: ServerProcess) -> None:
    """The three spellings of the hint, and none: what is left of a conversation's first turn after others' load."""
    asked = "the lazy dog has run over " + " ".join(f"hill {i}" for i in range(12))
    cached = {}
    for number, (name, hint) in enumerate(
        [("none", {}), ("keep_cache_seconds", {"keep_cache_seconds": 60}), ("prompt_cache_retention", {"prompt_cache_retention": "24h"})]
    ):
        turn = [{"role": "user", "content": f"{number}: {asked}"}]
        first = chat(running, turn, **hint)
        pressure(running, 30 + number)
        turn += [{"role": "assistant", "content": "the tool says"}, {"role": "user", "content": "go on"}]
        usage = chat(running, turn)["usage"]
        cached[name] = usage["prompt_tokens_details"]["cached_tokens"]
        if hint:
            assert cached[name] >= first["usage"]["prompt_tokens"] - 3  # the generation prompt is not part of the next turn
    assert cached["none"] < PAGE


def test_anthropics_cache_control_keeps_and_counts(running: ServerProcess) -> None:
    assert running.get("/flush_cache")[0] == 200  # what other tests have had kept
    client = anthropic.Anthropic(base_url=running.url.removesuffix("/v1"), api_key="none", max_retries=0)
    system: Any = [{"type": "text", "text": "jumps " * 60, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]

    def turn(text: str) -> Any:
        return client.messages.create(model=folder_name(running), max_tokens=2, system=system, messages=[{"role": "user", "content": text}]).usage

    first = turn("how are you today?")
    assert first.cache_creation is not None and first.cache_creation.ephemeral_1h_input_tokens == first.cache_creation_input_tokens > 60
    assert first.cache_read_input_tokens < PAGE and first.input_tokens > 5
    pressure(running, 40)
    second = turn("one two three")
    assert second.cache_read_input_tokens >= first.cache_creation_input_tokens and second.cache_creation_input_tokens == 0


def folder_name(server: ServerProcess) -> str:
    return str(ask(server, "GET", "/v1/models")[1]["data"][0]["id"])


def test_pins_come_back_after_kill_9(running: ServerProcess) -> None:
    pin = one(running, "rules")
    restarts = running.engine_pid()
    os.kill(restarts, signal.SIGKILL)
    assert wait_for(lambda: running.get("/health")[0] == 200 and one(running, "rules")["resident_pages"] == pin["pages"], 60)
    assert running.engine_pid() != restarts
    pressure(running, 50)
    usage = chat(running, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= pin["pages"] * PAGE
