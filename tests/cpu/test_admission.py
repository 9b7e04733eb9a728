"""Who is let in: keys and their file, rates, priorities, room in requests and tokens, deadlines, cross-origin pages."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server, read_events

from miniinfer.config import ConfigError, ServerConfig
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.admission import OPEN, Admission, is_open
from miniinfer.serve.app import build_app
from miniinfer.serve.auth import Allowance, KeyEntry, Keys, load_keys
from miniinfer.serve.protocol import ApiError

KEY = "correct-horse-battery"
COMPLETIONS = "/v1/completions"
ASK = {"prompt": [1, 2, 3], "max_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json", **given})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    found = {name.lower(): value for name, value in response.getheaders()}
    return response.status, json.loads(raw) if found.get("content-type") == "application/json" and raw else raw, found


# -------------------------------------------------------------------------------------------------------------- keys


def every_route(router: Any) -> Iterator[Any]:
    """Routes, those of routers within routers too, and of what is mounted."""
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if hasattr(inner, "routes"):
            yield from every_route(inner)
        else:
            assert route.path
            yield route


def test_with_a_key_every_route_but_health_asks_for_it() -> None:
    with Server(FakeEngine(None), api_key=KEY) as server:
        walked: set[str] = set()
        for route in every_route(build_app(server.fleet)):
            path = route.path.replace("{name}", "index.html").replace(":path}", "}").replace("{", "").replace("}", "")
            for method in route.methods:
                status = ask(server, method, path, {})[0]
                assert (status == 401) == (not is_open(path)), f"{method} {path}: {status}"
                walked.add(route.path)
        assert walked >= {COMPLETIONS, "/metrics", "/version", "/openapi.json", "/start_profile", "/", *OPEN}
        for path in ("/metrics", "/version", "/openapi.json", "/docs", "/redoc", "/v1/models", "/no/such/route", "/live/", "//live", "/webs"):
            assert ask(server, "GET", path)[0] == 401, path
        assert [ask(server, "GET", path)[0] for path in OPEN] == [200] * len(OPEN)


def test_either_header_any_of_several_keys() -> None:
    with Server(FakeEngine(None), api_key=["first-key,second-key", "third-key"]) as server:
        for key in ("first-key", "second-key", "third-key"):
            assert ask(server, "GET", "/version", authorization=f"Bearer {key}")[0] == 200
            assert ask(server, "GET", "/version", authorization=f"bearer {key}")[0] == 200
            assert ask(server, "GET", "/version", x_api_key=key)[0] == 200
        for wrong in ("first-key,second-key", "first-ke", "first-keyy", "", "FIRST-KEY", "\xe9"):
            status, body, headers = ask(server, "GET", "/version", authorization=f"Bearer {wrong}")
            assert status == 401 and headers["www-authenticate"] == "Bearer" and body["error"]["code"] == "invalid_api_key"
            assert ask(server, "GET", "/version", x_api_key=wrong)[0] == 401
        assert ask(server, "GET", "/version", authorization="Basic first-key")[0] == 401


def test_an_empty_key_is_no_way_to_open_a_server() -> None:
    for given in ("", " ", "a,,b", [""]):
        with pytest.raises(ConfigError, match="api_key"):
            ServerConfig(api_key=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("keys.toml", "[[keys]]\nname = 'a'\n", "missing required field `key`.*keys\\[0\\]"),
        ("keys.toml", "[[keys]]\nname = 'a'\nkey = 'long enough'\nrate = 5\n", "unknown field `rate`"),
        ("keys.toml", "[[keys]]\nname = 'a'\nkey = 'long enough'\nrequests_per_minute = '5'\n", "Expected `int.*requests_per_minute"),
        ("keys.toml", "[[keys]]\nname = 'a'\nkey = 'long enough'\ntokens_per_minute = 0\n", "tokens_per_minute must be at least 1"),
        ("keys.toml", "[[keys]]\nname = 'a'\nkey = 'short'\n", "at least 8 printable"),
        ("keys.toml", "[[keys]\n", "not valid TOML.*line 1"),
        ("keys.toml", "", "missing required field `keys`"),
        ("keys.json", '{"keys": [', "not valid JSON line 1"),
        ("keys.json", '{"keys": []}', "has no keys"),
        ("keys.json", '{"keys": [{"name": "a", "key": "the same key"}, {"name": "b", "key": "the same key"}]}', "key of 'b' is there twice"),
        ("absent.toml", None, "cannot read .*absent.toml"),
    ],
)
def test_a_bad_keys_file_is_one_clear_error(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"^api_keys_file: .*{said}") as error:
        load_keys(ServerConfig(api_keys_file=str(tmp_path / name)))
    assert "long enough" not in str(error.value) and "the same key" not in str(error.value)


def keys_file(folder: Path, **more: Any) -> str:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "limited", "key": "limited-key", **more}, {"name": "other", "key": "another-key"}]}))
    return str(path)


def test_requests_a_minute_of_one_key(tmp_path: Path) -> None:
    with Server(FakeEngine(None), api_keys_file=keys_file(tmp_path, requests_per_minute=3)) as server:
        answers = [ask(server, "POST", COMPLETIONS, ASK, x_api_key="limited-key") for _ in range(4)]
        assert [status for status, *_ in answers] == [200, 200, 200, 429]
        assert answers[3][1]["error"]["code"] == "rate_limit_exceeded" and 10 <= int(answers[3][2]["retry-after"]) <= 20
        assert ask(server, "POST", COMPLETIONS, ASK, x_api_key="another-key")[0] == 200
        assert ask(server, "GET", "/v1/models", x_api_key="limited-key")[0] == 200


def test_tokens_a_minute_of_one_key_count_prompts_and_output(tmp_path: Path) -> None:
    with Server(FakeEngine(None), api_keys_file=keys_file(tmp_path, tokens_per_minute=10)) as server:
        answers = [ask(server, "POST", COMPLETIONS, ASK, x_api_key="limited-key") for _ in range(3)]  # six tokens each
        assert [status for status, *_ in answers] == [200, 200, 429]
        assert int(answers[2][2]["retry-after"]) >= 20
        assert ask(server, "POST", COMPLETIONS, ASK, x_api_key="another-key")[0] == 200


def test_a_keys_priority_is_not_for_its_holder_to_better(tmp_path: Path) -> None:
    engine = FakeEngine(None)
    with Server(engine, api_keys_file=keys_file(tmp_path, priority=4)) as server:
        for own in (0, -9, 3):
            assert ask(server, "POST", COMPLETIONS, {**ASK, "priority": own}, x_api_key="limited-key")[0] == 200
        ask(server, "POST", COMPLETIONS, {**ASK, "priority": -9}, x_api_key="another-key")
    assert [seen[2] for seen in engine.seen] == [4, 4, 7, 0]


def test_an_allowance_fills_evenly_and_can_be_overdrawn() -> None:
    now = 0.0
    bucket = Allowance(60, lambda: now)
    assert bucket.wait(60) == 0
    bucket.take(60)
    assert bucket.wait(1) == pytest.approx(1) and bucket.wait(600) == pytest.approx(60)  # more than it holds: when it is full
    now = 30.0
    assert bucket.wait(30) == 0
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(61)
    now = 1000.0
    assert bucket.wait(60) == 0


def test_no_key_reaches_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), Server(FakeEngine(None), api_key=KEY, api_keys_file=keys_file(tmp_path)) as server:
        for given in (KEY, "a-wrong-secret", "limited-key"):
            ask(server, "POST", COMPLETIONS, ASK, authorization=f"Bearer {given}")
            ask(server, "POST", COMPLETIONS, {**ASK, "nonsense": 1}, x_api_key=given)
        server.engine.die_after = 0
        ask(server, "POST", COMPLETIONS, ASK, authorization=f"Bearer {KEY}")
        assert ask(server, "GET", "/metrics", x_api_key=KEY)[1].find(KEY.encode()) < 0
    assert caplog.text and not any(secret in caplog.text for secret in (KEY, "a-wrong-secret", "limited-key", "another-key"))
    keys = Keys([KeyEntry(KEY, "a")])
    assert KEY not in repr(vars(keys))


# ------------------------------------------------------------------------------------------------------- behind a proxy


@pytest.mark.parametrize("prefix", ["/some/where/", "/v1"])
def test_a_prefix_that_a_proxy_strips_or_leaves(prefix: str) -> None:
    """Keys are asked for all the same, and our own paths work even if they begin alike."""
    with Server(FakeEngine(None), api_key=KEY, root_path=prefix) as server:
        for before in ("", prefix.rstrip("/")):
            assert ask(server, "GET", before + "/v1/models", x_api_key=KEY)[1]["data"][0]["id"] == "tiny"
            assert ask(server, "POST", before + COMPLETIONS, ASK, x_api_key=KEY)[0] == 200
            assert ask(server, "GET", before + "/v1/models")[0] == ask(server, "POST", before + COMPLETIONS, ASK)[0] == 401
            assert ask(server, "GET", before + "/ping")[0] == ask(server, "POST", before + "/ping")[0] == 200
            assert ask(server, "GET", before + "/no/such", x_api_key=KEY)[0] == 404
            assert b"<html" in ask(server, "GET", before + "/")[1]
        assert ask(server, "GET", "/v1/models/", x_api_key=KEY)[0] == 404, "a redirect would lead past the proxy"
        assert ask(server, "GET", "/openapi.json", x_api_key=KEY)[1]["servers"] == [{"url": prefix.rstrip("/")}]


def test_a_key_is_needed_whatever_the_prefix_looks_like() -> None:
    with Server(FakeEngine(None), api_key=KEY, root_path="/web") as server:
        assert ask(server, "GET", "/web/v1/models")[0] == 401 and ask(server, "GET", "/web/v1/models", x_api_key=KEY)[0] == 200


@pytest.mark.parametrize("bad", ["where", "/a b", "/a//b", "//x"])
def test_a_prefix_that_is_none(bad: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        ServerConfig(root_path=bad)


# --------------------------------------------------------------------------------------------------- cross-origin pages


def test_other_origins_only_where_they_are_named() -> None:
    asked = {"origin": "https://app.example", "access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    with Server(FakeEngine(None), api_key=KEY) as server:
        status, _, headers = ask(server, "OPTIONS", COMPLETIONS, **asked)
        assert status == 401 and "access-control-allow-origin" not in headers
        headers = ask(server, "GET", "/live", origin="https://app.example")[2]
        assert "access-control-allow-origin" not in headers
    with Server(FakeEngine(None), api_key=KEY, cors_origin=["https://app.example"]) as server:
        status, _, headers = ask(server, "OPTIONS", COMPLETIONS, **asked)
        assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"
        status, _, headers = ask(server, "POST", COMPLETIONS, ASK, origin="https://app.example")
        assert status == 401 and headers["access-control-allow-origin"] == "https://app.example"  # the page may read why
        assert "access-control-allow-origin" not in ask(server, "GET", "/live", origin="https://other.example")[2]


# ---------------------------------------------------------------------------------------------------- room and deadlines


def test_room_in_requests_and_tokens_and_a_retry_after_from_the_rate() -> None:
    now = 0.0
    admission = Admission(ServerConfig(max_waiting=4, max_waiting_tokens=1000), lambda: now)
    with pytest.raises(ApiError, match="5 prompts in one request") as never:
        admission.check(5)
    assert never.value.status == 400
    tickets = [admission.enter([100], 100, None) for _ in range(4)]
    with pytest.raises(ApiError, match="4 requests are unfinished") as full:
        admission.enter([1], 1, None)
    assert full.value.status == 429 and full.value.headers == {"retry-after": "1"}  # nothing is known of the rate
    for ticket in tickets[:3]:
        now += 10.0
        ticket.leave(5)
        ticket.leave(5)
    assert (admission.requests, admission.tokens) == (1, 200)
    with pytest.raises(ApiError, match="leave no room for 900 more") as tokens:
        admission.enter([450], 450, None)
    # Three times 200 tokens ended in 20 s; 100 too many take 3.3 s.
    assert tokens.value.status == 429 and tokens.value.headers == {"retry-after": "4"}
    with pytest.raises(ApiError, match="no room for 1034 more"):
        admission.enter([10], None, None)  # output that is not stated counts as 1024
    tickets[3].leave(5)
    admission.enter([5000], 5000, None)  # nothing else is there: the context bounds it


def test_a_full_server_says_when_to_come_back(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with Server(engine, max_waiting=2) as server:
        engine.gate = asyncio.Event()
        threads = [threading.Thread(target=ask, args=(server, "POST", COMPLETIONS, {"prompt": "x"})) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(engine.open) < 2:
            time.sleep(0.01)
        status, body, headers = ask(server, "POST", COMPLETIONS, {"prompt": "x"})
        assert status == 429 and int(headers["retry-after"]) >= 1 and "unfinished" in body["error"]["message"]
        server.uvicorn.servers[0].get_loop().call_soon_threadsafe(engine.gate.set)
        for thread in threads:
            thread.join()
        assert ask(server, "POST", COMPLETIONS, {"prompt": "x"})[0] == 200
        assert server.api.gate.admission.requests == server.api.gate.admission.tokens == 0


@pytest.mark.parametrize("how", ["header", "field"])
def test_a_deadline_ends_a_request_alone(tokenizer: Tokenizer, how: str) -> None:
    engine = FakeEngine(tokenizer, lambda prompt: "a long answer " * 30)
    engine.delay = 0.02
    headers, field = ({"x_request_timeout": "0.4"}, {}) if how == "header" else ({}, {"timeout": 0.4})
    with Server(engine) as server:
        begin = time.monotonic()
        status, body, _ = ask(server, "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 400, **field}, **headers)
        assert status == 408 and body["error"]["code"] == "timeout" and 0.3 < time.monotonic() - begin < 2
        status, body, _ = ask(server, "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 400, "stream": True, **field}, **headers)
        *events, last = read_events(body)
        assert status == 200 and len(events) > 3 and last["error"]["code"] == "timeout"
        engine.delay = 0.0
        assert ask(server, "POST", COMPLETIONS, {"prompt": "x", **field}, **headers)[0] == 200
        assert not engine.open and server.api.gate.admission.requests == 0


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_deadline_must_be_seconds(value: str) -> None:
    with Server(FakeEngine(None)) as server:
        status, body, _ = ask(server, "POST", COMPLETIONS, ASK, x_request_timeout=value)
        assert status == 400 and body["error"]["param"] == "x-request-timeout"
