"""/v1/prefixes and retention hints over a fake engine: which tokens are pinned, by whom and for how long; what each API's hints become."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from chat_tokenizer import save_tokenizer
from echo_core import REFUSE
from serve_fake import FakeEngine, Server

from miniinfer.config import ConfigError, EngineConfig, ServerConfig
from miniinfer.data import MAX_KEEP_SECONDS, RequestOutput
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.prefixes import MOST_PINS, PrefixRequest, common_prefix, pin_files, prefix_tokens, read_file
from miniinfer.serve.protocol import ApiError, checked
from miniinfer.serve.service import Service

SYSTEM = "you are the quick brown fox, and you jump over the lazy dog when you are told"
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def open_server(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(open_server: Server) -> Server:
    """Over a fresh engine, with nothing pinned."""
    open_server.engine = open_server.api.engine = FakeEngine(open_server.engine.tokenizer)
    open_server.fleet.pins.clear()
    return open_server


def ask(server: Server, method: str, path: str = "", body: Any = None, key: str = "") -> tuple[int, Any]:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path if path.startswith("/v1") else "/v1/prefixes" + path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def rules(name: str = "rules", **fields: Any) -> dict[str, Any]:
    return {"name": name, "messages": [{"role": "system", "content": SYSTEM}], **fields}


def names(server: Server, key: str = "") -> list[str]:
    return [pin["name"] for pin in ask(server, "GET", key=key)[1]["data"]]


# ------------------------------------------------------------------------------------------------- which tokens


def tokens_of(tokenizer: Tokenizer, **fields: Any) -> list[int]:
    service = Service(FakeEngine(tokenizer), ServerConfig(), "tiny", {})  # type: ignore[arg-type]
    return asyncio.run(prefix_tokens(service, checked(PrefixRequest, {"name": "x", **fields})))


@pytest.mark.parametrize("said", ["hello", "0 and 1", "\n\nhello", " hello", "<tool_call>", ""])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_conversations_begin_with_what_is_pinned(tokenizer: Tokenizer, said: str, tools: Any) -> None:
    system = {"role": "system", "content": SYSTEM}
    pinned = tokens_of(tokenizer, messages=[system], tools=tools)
    whole = tokenizer.encode(tokenizer.render_chat([system, {"role": "user", "content": said}], tools), False)
    assert whole[: len(pinned)] == pinned
    assert tokenizer.decode(pinned, skip_special_tokens=False).rstrip().endswith("<|im_end|>\n<|im_start|>user")


def test_a_pinned_question_ends_where_its_answer_may_begin(tokenizer: Tokenizer) -> None:
    """The template may put something before the answer, or not."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "how are you today?"}]
    pinned = tokens_of(tokenizer, messages=messages)
    for variables in ({}, {"enable_thinking": False}):
        whole = tokenizer.encode(tokenizer.render_chat(messages, None, True, **variables), False)
        assert whole[: len(pinned)] == pinned
    assert "today?" in tokenizer.decode(pinned)


@pytest.mark.parametrize("following", ["x", "9", " and", "\n", "."])
def test_a_text_ends_before_a_token_that_goes_on(tokenizer: Tokenizer, following: str) -> None:
    text = "the quick brown fox jumps over the la"
    pinned = tokens_of(tokenizer, prompt=text)
    assert tokenizer.encode(text + following)[: len(pinned)] == pinned and len(pinned) > 5
    assert tokens_of(tokenizer, prompt=[5, 6, 7]) == [5, 6, 7]


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == [] and common_prefix([[1, 2]]) == [1, 2]


# -------------------------------------------------------------------------------------------------------- routes


def test_create_list_delete(server: Server) -> None:
    status, made = ask(server, "POST", body=rules(cache_salt="mine"))
    assert status == 200
    ((id, (tokens, salt)),) = server.engine.pins.items()
    assert made.pop("age_seconds") < 60 and abs(made.pop("created") - time.time()) < 60
    assert made == {
        "object": "prefix",
        "name": "rules",
        "model": "tiny",
        "tokens": len(tokens),
        "pages": len(tokens) // 16,
        "resident_pages": len(tokens) // 16,
        "hits": 7,
        "expires_in_seconds": None,
    }
    assert salt == "mine" and id.startswith("pin-")
    assert names(server) == ["rules"]
    assert ask(server, "POST", body=rules(cache_salt="mine", ttl_seconds=50))[1]["expires_in_seconds"] > 40 and len(server.engine.pins) == 1
    assert ask(server, "POST", body=rules())[1]["error"]["code"] == "name_in_use", "another salt"
    assert ask(server, "DELETE", "/rules")[1] == {"id": "rules", "object": "prefix", "deleted": True}
    assert ask(server, "DELETE", "/rules")[0] == 404 and names(server) == [] and not server.engine.pins


@pytest.mark.parametrize("seconds", [0.2, 1e-4, 5e-324])
def test_a_pin_ends_by_itself(server: Server, seconds: float) -> None:
    assert ask(server, "POST", body=rules(ttl_seconds=seconds))[0] == 200
    end = time.monotonic() + 10
    while names(server) and time.monotonic() < end:
        time.sleep(0.02)
    assert names(server) == [] and not server.engine.pins


@pytest.mark.parametrize(
    "body, field",
    [
        ({"name": "x"}, "prompt"),
        ({**rules(), "prompt": "hello"}, "prompt"),
        ({"name": "x", "prompt": "hello", "tools": [TOOL]}, "tools"),
        ({"name": "x", "prompt": ""}, "prompt"),
        ({"name": "x", "prompt": [1, "2"]}, "prompt"),
        ({"name": "x", "prompt": "hello"}, "prompt"),  # less than a page
        ({"name": "x", "prompt": [400] * 50}, "prompt"),  # outside the vocabulary
        ({"name": "x", "prompt": [5] * 600}, None),  # more than the context
        ({"name": "../x", "prompt": [5] * 50}, "name"),
        ({**rules(), "ttl_seconds": 0}, "ttl_seconds"),
        ({**rules(), "colour": 1}, "colour"),
        ({"name": "x", "messages": []}, "messages"),
    ],
)
def test_bad_bodies(server: Server, body: dict[str, Any], field: str | None) -> None:
    status, error = ask(server, "POST", body=body)
    assert status == 400 and (field is None or str(error["error"]["param"]).startswith(field)), error
    assert names(server) == [] and not server.engine.pins


class Refusing(FakeEngine):
    """Says what an engine says that has no room, or has failed, or was shut down."""

    said: Any = None

    async def pin(self, id: str, tokens: list[int], cache_salt: str = "") -> RequestOutput:
        output = await super().pin(id, tokens, cache_salt)
        self.pins.clear()
        output.error, output.invalid, output.outputs[0].finish_reason = self.said
        return output


@pytest.mark.parametrize(
    "said, status",
    [(("no room (max_pinned_fraction)", True, "error"), 409), (("logits", False, "error"), 500), ((None, False, "abort"), 503)],
)
def test_what_the_engine_refuses_is_not_there(server: Server, said: Any, status: int) -> None:
    server.engine = server.api.engine = Refusing(server.engine.tokenizer)  # type: ignore[assignment]
    server.engine.said = said
    found, error = ask(server, "POST", body=rules())
    assert found == status and (said[0] or "") in error["error"]["message"]
    assert names(server) == [] and ask(server, "DELETE", "/rules")[0] == 404


def test_one_of_two_at_once_is_told_to_wait(server: Server) -> None:
    async def both() -> list[Any]:
        server.engine.gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(None, ask, server, "POST", "", rules())
        while not server.engine.open:
            await asyncio.sleep(0.005)
        second = await loop.run_in_executor(None, ask, server, "POST", "", rules())
        assert await loop.run_in_executor(None, names, server) == []
        server.uvicorn.servers[0].get_loop().call_soon_threadsafe(server.engine.gate.set)
        return [await first, second]

    (first, _), (second, error) = asyncio.run(both())
    assert (first, second) == (200, 409) and "is being computed" in error["error"]["message"]


def test_a_deadline_holds_here_too(server: Server) -> None:
    server.engine.gate = asyncio.Event()  # never set
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/prefixes", json.dumps(rules()), {"content-type": "application/json", "x-request-timeout": "0.1"})
    assert connection.getresponse().status == 408
    assert names(server) == [] and not server.engine.open and server.api.gate.admission.requests == 0


def test_there_is_a_most(server: Server) -> None:
    for number in range(MOST_PINS):
        server.fleet.pins[None, f"filler {number}"] = object()
    assert ask(server, "POST", body=rules())[1]["error"]["code"] == "too_many_prefixes"


def test_keys_have_their_own(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), api_key=["alpha", "beta"]) as server:
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/rules")):
            assert ask(server, method, path)[0] == 401
        assert ask(server, "POST", body=rules(), key="alpha")[0] == 200
        assert (names(server, "alpha"), names(server, "beta")) == (["rules"], [])
        assert ask(server, "DELETE", "/rules", key="beta")[0] == 404
        assert ask(server, "POST", body=rules(), key="beta")[0] == 200, "the same name is free for another"
        assert ask(server, "DELETE", "/rules", key="alpha")[0] == 200 and names(server, "beta") == ["rules"]


def test_pins_are_listed_while_the_engine_is_away(server: Server) -> None:
    async def away(command: str) -> Any:
        raise EngineDeadError("restarting")

    ask(server, "POST", body=rules())
    server.engine.control = away
    (pin,) = ask(server, "GET")[1]["data"]
    assert pin["pages"] > 0 and pin["resident_pages"] == pin["hits"] == 0


# --------------------------------------------------------------------------------------------------------- files


def test_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "support.json").write_text(json.dumps(rules()["messages"]))
    (tmp_path / "body.json").write_text(json.dumps({"name": "other", "prompt": [7] * 40, "cache_salt": "s"}))
    (tmp_path / "story.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    engine = FakeEngine(tokenizer)
    fleet = Fleet.of(Service(engine, ServerConfig(), "tiny", {}))  # type: ignore[arg-type]
    paths = [str(tmp_path / name) for name in ("support.json", "body.json", "story.txt")]
    asyncio.run(pin_files(fleet, paths))
    assert [name for _, name in fleet.pins] == ["support", "other", "story"] and len(engine.pins) == 3
    (tmp_path / "story.txt").write_text("another story, and quite another one than that of the fox and the dog")
    with pytest.raises(ConfigError, match=r"pin_prefix: .*story\.txt: name: 'story' is another prefix's"):
        asyncio.run(pin_files(fleet, paths[2:]))


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "3", "list of messages"),
        ("a.json", '[{"role": "king", "content": "x"}]', r"messages\.0\.role"),
        ("a.txt", "", "prompt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"pin_prefix: .*{said}"):
        read_file(str(tmp_path / name))
    with pytest.raises(ConfigError, match="pin_prefix: cannot read"):
        read_file(str(tmp_path / "nowhere"))


# -------------------------------------------------------------------------------------------------- engine process


def test_the_engine_client_renews_pins_where_they_are_lost() -> None:
    async def body() -> None:
        config = EngineConfig(model="echo", skip_tokenizer_init=True, enable_sleep_mode=True)
        engine = AsyncEngine(config, core="echo_core:EchoCore")
        await engine.start(timeout=30)

        async def computed() -> int:
            """Steps of the present process, which has none but those for pins."""
            while engine._ledger or not engine.stats.get("steps"):
                await asyncio.sleep(0.01)
            return int(engine.stats["steps"])

        try:
            async with asyncio.timeout(60):
                assert (await engine.pin("good", [5, 6, 7])).error is None
                assert (await engine.pin("bad", [REFUSE, 6])).error == "prompt: cannot be computed"
                with pytest.raises(ValueError, match="vocabulary"):
                    await engine.pin("worse", [5000])
                assert list(engine.pins) == ["good"]
                before = await computed()
                await engine.sleep()
                await engine.wake_up()
                assert await computed() > before
                os.kill(engine.info["pid"], signal.SIGKILL)
                while not engine.num_restarts:
                    engine.stats = {}
                    await asyncio.sleep(0.01)
                assert await computed() > 0 and engine.num_restarts == 1 and list(engine.pins) == ["good"]
                engine.unpin("good")
                assert (await engine.control("state"))["aborted"] == [] and not engine.pins
        finally:
            await engine.shutdown()

    asyncio.run(body())


# --------------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
def test_openais_retention(server: Server, path: str, body: dict[str, Any]) -> None:
    def kept(**fields: Any) -> float:
        assert ask(server, "POST", path, {**body, **fields})[0] == 200
        return server.engine.seen[-1][1].keep_cache_seconds

    assert kept(prompt_cache_retention="24h") == MAX_KEEP_SECONDS
    assert kept(prompt_cache_retention="in_memory") == kept(prompt_cache_retention="in-memory") == kept(prompt_cache_key="me") == 0
    if path != "/v1/responses":
        assert kept(prompt_cache_retention="24h", keep_cache_seconds=5) == 5
    status, error = ask(server, "POST", path, {**body, "prompt_cache_retention": "a week"})
    assert status == 400 and error["error"]["param"] == "prompt_cache_retention"


EPHEMERAL: Any = {"type": "ephemeral"}
HOUR: Any = {"type": "ephemeral", "ttl": "1h"}


def text(said: str, mark: Any = None) -> dict[str, Any]:
    return {"type": "text", "text": said, **({"cache_control": mark} if mark else {})}


@pytest.mark.parametrize(
    "marks, expected",
    [
        ({}, []),
        ({"system": EPHEMERAL}, [("system", 300)]),
        ({"tool": EPHEMERAL}, [("system", 300)]),
        ({"first": EPHEMERAL}, [("first", 300)]),
        ({"last": EPHEMERAL, "system": EPHEMERAL}, [("last", 300)]),
        ({"last": EPHEMERAL, "system": HOUR}, [("last", 300), ("system", 3600)]),
        ({"last": HOUR, "system": EPHEMERAL}, [("last", 3600)]),
        ({"whole": HOUR}, [("last", 3600)]),
    ],
    ids=str,
)
def test_marks_become_prefixes_to_keep(server: Server, marks: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tool: Any = {"name": "weather", "input_schema": {"type": "object"}}
    messages: Any = [
        {"role": "user", "content": [text("one two three", marks.get("first"))]},
        {"role": "assistant", "content": "four five"},
        {"role": "user", "content": [text("six seven", marks.get("last"))]},
    ]
    fields: dict[str, Any] = {"cache_control": marks["whole"]} if "whole" in marks else {}
    answer = client.messages.create(
        model="tiny",
        max_tokens=5,
        system=[text(SYSTEM, marks.get("system"))],  # type: ignore[list-item]
        tools=[{**tool, "cache_control": marks["tool"]} if "tool" in marks else tool],
        messages=messages,
        extra_body=fields,
    )
    prompt, params, _, _ = server.engine.seen[-1]
    whole = server.engine.tokenizer.decode(prompt, skip_special_tokens=False)
    ends = {"system": whole.index("one two"), "first": whole.index("four five"), "last": len(whole)}
    kept = [
        (len(server.engine.tokenizer.decode(prompt[:tokens], skip_special_tokens=False)), seconds)
        for tokens, seconds in params.keep_cache_prefixes or []
    ]
    assert kept == [(ends[name], seconds) for name, seconds in expected]
    usage, longest = answer.usage, max([0, *(tokens - 3 for tokens, _ in params.keep_cache_prefixes or [])])
    assert usage.cache_read_input_tokens == 3 and usage.cache_creation_input_tokens == longest
    assert usage.input_tokens == len(prompt) - 3 - longest
    assert usage.cache_creation is not None
    split = usage.cache_creation
    assert split.ephemeral_1h_input_tokens + split.ephemeral_5m_input_tokens == longest
    assert (split.ephemeral_1h_input_tokens > 0) == (3600 in [seconds for _, seconds in expected])
    assert (split.ephemeral_5m_input_tokens > 0) == (300 in [seconds for _, seconds in expected])


def test_marks_are_checked_and_mean_nothing_without_a_cache(server: Server) -> None:
    body = {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": [text("hello", {"type": "for ever"})]}]}
    status, error = ask(server, "POST", "/v1/messages", body)
    assert status == 400 and "cache_control.type" in error["error"]["message"]
    server.engine.info["enable_prefix_caching"] = False
    body["messages"] = [{"role": "user", "content": [text("hello", HOUR)]}]
    status, answer = ask(server, "POST", "/v1/messages", body)
    assert status == 200 and answer["usage"]["cache_creation_input_tokens"] == 0 and server.engine.seen[-1][1].keep_cache_prefixes is None


def test_a_prefix_request_is_strict() -> None:
    with pytest.raises(ApiError, match="name"):
        checked(PrefixRequest, {"name": 3, "prompt": "x"})
