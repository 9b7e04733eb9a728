"""/openapi.json is true: a fuzzer that believes it finds no answer that it does not describe, and no bad body that is taken."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer

# `positive_data_acceptance` is left out: rules between fields (min_tokens <= max_tokens) are not in the document.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection,unsupported_method"


class Engine(FakeEngine):
    async def control(self, command: str) -> Any:
        if command == "pins":
            return await super().control(command)
        raise RuntimeError("ValueError: profile: give --profile FOLDER")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(Engine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


def ask(server: Server, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    raw = response.read()
    return response.status, json.loads(raw) if raw and "json" in response.headers["content-type"] else None, response.headers


def test_a_fuzzer_finds_nothing(server: Server, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--max-examples", "3", "--generation-deterministic"]
        + ["--phases", "coverage,fuzzing", "--checks", CHECKS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stdout[-6000:]
    assert server.api.unfinished == 0


def test_the_document_is_a_valid_one(server: Server) -> None:
    status, document, _ = ask(server, "GET", "/openapi.json")
    assert status == 200 and document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    completion = document["components"]["schemas"]["CompletionRequest"]
    validator = jsonschema.Draft202012Validator({**completion, "components": document["components"]})
    assert validator.is_valid({"prompt": [[1, 319]], "stop": "x", "user": "me", "stream": None, "unknown": None})
    for wrong in ({"prompt": [[1, 320]]}, {"prompt": "x", "unknown": 1}, {"prompt": "x", "n": 0}, {"prompt": "x", "stream": "yes"}, {}):
        assert not validator.is_valid(wrong)


def test_every_post_says_what_it_takes(server: Server) -> None:
    document = ask(server, "GET", "/openapi.json")[1]
    empty = {"/start_profile", "/stop_profile"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method in ("post", "put", "patch") and path.startswith("/v1/") and not path.endswith("/cancel"):
                assert "requestBody" in operation, path
            answer = operation["responses"]["200"]["content"]
            assert path in empty or all(medium["schema"] for medium in answer.values()), f"{path} does not say what it answers"


def test_the_document_asks_for_the_key_where_the_server_does(server: Server) -> None:
    with Server(Engine(None), api_key="secret") as closed:
        assert ask(closed, "GET", "/openapi.json")[0] == 401
        status, document, _ = ask(closed, "GET", "/openapi.json", headers={"authorization": "Bearer secret"})
        assert status == 200
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                refused = ask(closed, method.upper(), path, b"{}")[0] == 401
                assert refused == ("security" in operation), f"{method} {path}"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v1/completions", b"", {}, 405),
        ("DELETE", "/v1/models", b"", {}, 405),
        ("POST", "/v1/completions", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', {}, 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "temperature": NaN}', {}, 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "temperature": 1e999}', {}, 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "top_k": 99999999999999999999}', {}, 400),
        ("POST", "/v1/completions", b'{"prompt": [99999999999999999999]}', {}, 400),
        ("POST", "/v1/chat/completions", b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", {}, 400),
        ("POST", "/v1/completions", b"\xff\xfe", {}, 400),
    ],
)
def test_what_is_wrong_gets_a_4xx_in_openais_shape(server: Server, method: str, path: str, body: bytes, headers: dict[str, str], status: int) -> None:
    got, answer, heads = ask(server, method, path, body, headers)
    assert got == status and answer["error"]["message"], answer
    assert status != 405 or heads["allow"]


def test_models(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    assert model.id == "tiny" and model.object == "model" and model.created > 0 and model.owned_by == "miniinfer"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
