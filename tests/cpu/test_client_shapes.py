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
