"""Several models behind one address: names, loading on demand, who makes room for whom, and replacing a version while it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.config import ConfigError, EngineConfig, ServerConfig
from miniinfer.engine.client import EngineDeadError
from miniinfer.engine.text import Tokenizer
from miniinfer.serve import fleet as fleets
from miniinfer.serve.fleet import Fleet, Member
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.specs import below, in_folder, read_spec, specs

LIVES: list[str] = []  # what engines did, in order


class Engine(FakeEngine):
    """Answers with its model's name; takes a while to start, fails to if its model is called broken."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(tokenizer, lambda prompt: config.model)
        self.config, self.is_alive = config, False
        self.pins: dict[str, Any] = {}

    async def start(self) -> None:
        LIVES.append(f"+{self.config.model}")
        await asyncio.sleep(0.01)
        if self.config.model == "broken":
            raise EngineDeadError("no such thing")
        self.info["folder"] = "."
        self.is_alive = True

    async def shutdown(self) -> None:
        if self.is_alive:
            LIVES.append(f"-{self.config.model}")
        self.is_alive = False

    async def sleep(self, level: int) -> None:
        LIVES.append(f"-{self.config.model} to level {level}")

    async def wake_up(self) -> None:
        if self.config.model == "dead sleeper":
            raise EngineDeadError("died in its sleep")
        LIVES.append(f"+{self.config.model} awake")


def member(name: str, config: ServerConfig, **options: Any) -> Member:
    return Member(name, EngineConfig(model=options.pop("model", name), **options), config)


def made(names: list[str], tokenizer: Tokenizer | None = None, **options: Any) -> Fleet:
    config = ServerConfig(**options)
    return Fleet(config, [member(name, config) for name in names], lambda engine, _: Engine(engine, tokenizer))  # type: ignore[arg-type,return-value]


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    LIVES.clear()
    asyncio.run(asyncio.wait_for(work(), 20))


# ----------------------------------------------------------------------------------------------------------- memory


def test_loaded_on_demand_once() -> None:
    async def work() -> None:
        fleet = made(["a", "b"])
        services = await asyncio.gather(*(fleet.service("b") for _ in range(5)))
        assert len(set(map(id, services))) == 1 and LIVES == ["+b"]
        assert [card["status"]["value"] for card in fleet.cards()] == ["unloaded", "loaded"]
        with pytest.raises(ApiError, match=r"'c' does not exist; this server has 'a', 'b'"):
            await fleet.service("c")
        await fleet.shutdown()
        assert LIVES == ["+b", "-b"]

    run(work)


def test_the_least_recently_used_makes_room() -> None:
    async def work() -> None:
        fleet = made(["a", "b", "c"], max_loaded_models=2)
        for name in ("a", "b", "a", "c", "a"):
            async with fleet.hold(fleet.find(name)):
                pass
        assert LIVES == ["+a", "+b", "-b", "+c"]
        await fleet.shutdown()

    run(work)


def test_a_busy_model_is_left_alone_and_then_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another waits for its room a model finishes what it has; requests that come later wait until it is back."""
    monkeypatch.setattr(fleets, "PATIENCE", 0.05)

    async def work() -> None:
        fleet = made(["a", "b"], max_loaded_models=1)
        a, b = fleet.find("a"), fleet.find("b")
        order: list[str] = []
        gate = asyncio.Event()

        async def request(member: Member, name: str, wait: asyncio.Event | None = None) -> None:
            async with fleet.hold(member):
                assert fleet.find(None).state == "loaded" or member is b
                order.append(name)
                if wait is not None:
                    await wait.wait()

        first = asyncio.create_task(request(a, "a1", gate))
        await asyncio.sleep(0.05)
        other = asyncio.create_task(request(b, "b"))
        await asyncio.sleep(0.15)  # patience is over, yet a1 runs
        later = asyncio.create_task(request(a, "a2"))
        await asyncio.sleep(0.05)
        assert order == ["a1"] and a.state == "loaded" and b.state == "unloaded"
        gate.set()
        await asyncio.gather(first, other, later)
        assert order == ["a1", "b", "a2"] and LIVES == ["+a", "-a", "+b", "-b", "+a"]
        await fleet.shutdown()

    run(work)


def test_taking_turns_every_request_is_served() -> None:
    async def work() -> None:
        fleet = made(["a", "b", "c"], max_loaded_models=1)
        served = []

        async def request(i: int) -> None:
            member = fleet.find("abc"[i % 3])
            async with fleet.hold(member):
                assert member.state == "loaded" and sum(m.state == "loaded" for m in fleet.members.values()) == 1
                await asyncio.sleep(0.001)
                served.append(i)

        await asyncio.gather(*(request(i) for i in range(60)))
        assert sorted(served) == list(range(60)) and len(LIVES) < 30
        assert not any(m.busy for m in fleet.members.values())
        await fleet.shutdown()

    run(work)


def test_who_gives_up_waiting_harms_nobody() -> None:
    async def work() -> None:
        fleet = made(["a", "b"])
        impatient, patient = asyncio.create_task(fleet.service("b")), asyncio.create_task(fleet.service("b"))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).model == "b" and LIVES == ["+b"]
        await fleet.shutdown()

    run(work)


def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_again() -> None:
    async def work() -> None:
        fleet = made(["a", "broken"])
        for _ in range(2):
            with pytest.raises(ApiError, match="'broken' could not be loaded: no such thing") as e:
                await fleet.service("broken")
            assert e.value.status == 503
        assert LIVES == ["+broken", "+broken"] and (await fleet.service("a")).model == "a"
        await fleet.shutdown()

    run(work)


def test_the_gpus_memory_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        config = ServerConfig()
        shares = {"a": 0.5, "b": 0.4, "c": 0.5}
        members = [member(name, config, gpu_memory_utilization=share) for name, share in shares.items()]
        fleet = Fleet(config, members, lambda engine, _: Engine(engine, None))  # type: ignore[arg-type,return-value]
        (await fleet.service("a")).engine.info["device"] = "cuda"
        await fleet.service("b")
        assert LIVES == ["+a", "+b"]
        await fleet.service("c")  # 0.5 + 0.4 + 0.5: the oldest must go
        assert LIVES == ["+a", "+b", "-a", "+c"]
        await fleet.shutdown()

    run(work)


def test_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_bytes_of", lambda config: 10)
    room = {"free": 15}

    def available() -> int:
        return room["free"] + sum(-10 if life[0] == "+" else 10 for life in LIVES)

    monkeypatch.setattr(fleets, "_available", available)

    async def work() -> None:
        fleet = made(["a", "b"])
        await fleet.service("a")
        await fleet.service("b")
        assert LIVES == ["+a", "-a", "+b"]
        room["free"] = 5
        with pytest.raises(ApiError, match="GiB for its weights"):
            async with fleet.hold(fleet.find("a")):
                pass
        assert LIVES[-1] == "-b"  # it was tried
        await fleet.shutdown()

    run(work)


def test_idle_models_go_and_come_back() -> None:
    async def work() -> None:
        fleet = made(["a"], model_idle_seconds=0.05)
        engine = Engine(fleet.find("a").config, None)
        await engine.start()
        fleet.adopt(engine)  # type: ignore[arg-type]
        a = fleet.find("a")
        async with fleet.hold(a):
            await asyncio.sleep(0.2)
            assert a.state == "loaded"
        await asyncio.sleep(0.2)
        assert a.state == "unloaded" and fleet.status == "ok"
        async with fleet.hold(a):
            assert a.state == "loaded"
        await fleet.shutdown()
        assert LIVES == ["+a", "-a", "+a", "-a"]

    run(work)


def test_sleep_instead_of_an_end() -> None:
    async def work() -> None:
        config = ServerConfig(max_loaded_models=1)
        members = [member(name, config, enable_sleep_mode=True) for name in ("a", "dead sleeper")]
        fleet = Fleet(config, members, lambda engine, _: Engine(engine, None))  # type: ignore[arg-type,return-value]
        a, b = members
        for one in (a, b, a):
            async with fleet.hold(one):
                assert one.state == "loaded"
        assert LIVES == ["+a", "-a to level 1", "+dead sleeper", "-dead sleeper to level 1", "+a awake"] and b.state == "sleeping"
        with pytest.raises(ApiError, match="died in its sleep"):
            await fleet.load(b)
        await fleet.load(b)
        await fleet.unload(b)
        assert LIVES[5:] == ["-a to level 1", "-dead sleeper", "+dead sleeper", "-dead sleeper"] and b.state == "unloaded" and a.state == "sleeping"
        await fleet.shutdown()

    run(work)


def test_an_engine_that_died_for_good_is_replaced() -> None:
    async def work() -> None:
        fleet = made(["a", "b"])
        service = await fleet.service("a")
        service.engine.is_alive, service.engine.errored = False, True  # type: ignore[misc]
        async with service.hold():
            assert service.engine.is_alive
        assert LIVES == ["+a", "+a"]
        await fleet.shutdown()

    run(work)


# ------------------------------------------------------------------------------------------------- versions, aliases


def test_names() -> None:
    fleet = made(["chat:1", "chat:2", "other"], model_alias=["gpt-4=chat", "old=chat:1"])
    assert fleet.find("chat").name == "chat:1" == fleet.find(None).name == fleet.find("gpt-4").name
    assert fleet.find("chat:2").name == "chat:2" and fleet.names == ["chat:1", "chat:2", "other", "chat", "gpt-4", "old"]
    assert fleet.find("chat:latest").name == "chat:1" and fleet.find("other:latest").name == "other"
    assert {card["id"]: card["root"] for card in fleet.cards()}["gpt-4"] == "chat:1"
    for name in ("chat", "chat:1", "a b", ""):
        with pytest.raises(ApiError, match="alias"):
            fleet.alias(name, "other")
    with pytest.raises(ApiError, match="does not exist"):
        fleet.alias("new", "none")
    with pytest.raises(ApiError, match="there is a 'other' already"):
        fleet.add(member("other", fleet.config))


def test_a_version_is_replaced_without_a_gap() -> None:
    async def work() -> None:
        fleet = made(["chat:1"], model_alias=["gpt-4=chat"])
        fleet.add(member("chat:2", fleet.config))
        done: list[str] = []
        gate = asyncio.Event()

        async def request(name: str, wait: asyncio.Event | None = None) -> None:
            service = await fleet.service(name)
            async with service.hold():
                if wait is not None:
                    await wait.wait()
                assert service.engine.is_alive
                done.append(service.model)

        await request("chat")
        running = asyncio.create_task(request("chat", gate))
        await asyncio.sleep(0.01)
        switch = asyncio.create_task(fleet.activate(fleet.find("chat:2"), keep_previous=False))
        while not switch.done():
            await request("gpt-4")
            await asyncio.sleep(0.001)
        await request("chat")
        assert done[0] == "chat:1" and done[-1] == "chat:2" and fleet.find("chat:1").state == "loaded"  # it still has a request
        gate.set()
        await running
        assert done[-1] == "chat:1"
        while fleet.find("chat:1").state != "unloaded":
            await asyncio.sleep(0.01)
        await fleet.remove("chat:1")
        assert "chat:1" not in fleet.names and LIVES == ["+chat:1", "+chat:2", "-chat:1"]
        with pytest.raises(ApiError, match="'chat:2' is active"):
            await fleet.remove("chat:2")
        await fleet.remove("gpt-4")
        assert "gpt-4" not in fleet.names
        await fleet.shutdown()

    run(work)


def test_a_version_that_cannot_be_loaded_changes_nothing() -> None:
    async def work() -> None:
        fleet = made(["chat:1"])
        fleet.add(member("chat:2", fleet.config, model="broken"))
        await fleet.service("chat")
        with pytest.raises(ApiError, match="could not be loaded"):
            await fleet.activate(fleet.find("chat:2"), keep_previous=False)
        assert fleet.find("chat").name == "chat:1" and LIVES == ["+chat:1", "+broken"]
        await fleet.shutdown()

    run(work)


# ------------------------------------------------------------------------------------------------------ command line


def test_specs(tmp_path: Path) -> None:
    engine, server = EngineConfig(model="", max_num_seqs=7), ServerConfig()
    spec = read_spec("chat:2=some/hub,max-model-len=128,enforce_eager=true,tool_call_parser=hermes", engine, server)
    assert spec.name == "chat:2" and spec.engine.model == "some/hub" and spec.server.tool_call_parser == "hermes"
    assert (spec.engine.max_model_len, spec.engine.enforce_eager, spec.engine.max_num_seqs) == (128, True, 7)
    assert read_spec("some/hub", engine, server).name == "some/hub"
    for text, message in (
        ("a b=x", "'a b' is no name"),
        ("a=", "needs a folder"),
        ("a=x,port=3", "'port' of a is not an option"),
        ("a=x,max_num_seqs=many", "max_num_seqs: 'many' will not do"),
        ("a=x,max_num_seqs=0", "max_num_seqs: must be a positive integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_spec(text, engine, server)
    with pytest.raises(ConfigError, match="'a' is given twice"):
        specs(engine, ServerConfig(models=["a=x", "a=y"]))
    assert [s.name for s in specs(EngineConfig(model="bundled"), ServerConfig(models=["a=x"]))] == ["bundled", "a"]
    for name in ("one", "two/v9", "two/v10", "empty"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / name / "config.json").write_text("{}")
    assert [s.name for s in in_folder(tmp_path, engine, server)] == ["one", "two:v10", "two:v9"]
    assert below(str(tmp_path), "two/v9") == str(tmp_path / "two/v9")
    for path in ("..", "../" + tmp_path.name + "x", "/etc", "empty", "one/../../x"):
        with pytest.raises(ConfigError, match="is no checkpoint folder below"):
            below(str(tmp_path), path)


# -------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def server(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Server]:
    LIVES.clear()
    for name in ("new", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    fleet = made(["chat:1", "second"], tokenizer, models_dir=str(tmp_path), model_alias=["gpt-4=chat"])
    first = Engine(fleet.find(None).config, tokenizer)
    first.is_alive, first.info["folder"] = True, "."
    fleet.adopt(first)  # type: ignore[arg-type]
    with Server(first, fleet=fleet) as running:
        yield running


def test_over_http(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)

    def ask(model: str) -> tuple[str, str | None]:
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        return answer.model, answer.choices[0].message.content

    assert [model.id for model in client.models.list()] == ["chat:1", "second", "chat", "gpt-4"]
    assert ask("gpt-4") == ("chat:1", "chat:1") and ask("second") == ("second", "second") and LIVES == ["+second"]
    with pytest.raises(openai.NotFoundError, match="this server has 'chat:1', 'second'"):
        ask("third")
    made = httpx.post(server.url + "/models/register", json={"model": "chat:2", "path": "new", "options": {"max_num_seqs": 3}})
    assert made.status_code == 200 and made.json() == {"success": True, "model": "chat:2", "status": {"value": "unloaded"}}
    assert server.fleet.find("chat:2").config.max_num_seqs == 3
    assert httpx.post(server.url + "/models/activate", json={"model": "chat:2"}).json()["status"] == {"value": "loaded"}
    assert ask("gpt-4")[0] == "chat:2" and client.models.retrieve("chat").model_dump()["root"] == "chat:2"
    assert httpx.post(server.url + "/models/unload", json={"model": "second"}).json()["status"] == {"value": "unloaded"}
    assert httpx.post(server.url + "/models/load", json={"model": "second"}).json()["status"] == {"value": "loaded"}
    assert httpx.post(server.url + "/models/alias", json={"alias": "best", "model": "second"}).json()["model"] == "second"
    assert ask("best")[0] == "second"
    assert client.models.delete("best").deleted and client.models.delete("chat:1").deleted
    assert [model.id for model in client.models.list()] == ["second", "chat:2", "chat", "gpt-4"]
    metrics = httpx.get(server.url + "/metrics").text
    assert 'model_name="second"' in metrics and 'model_name="chat:2"' in metrics
    loads = httpx.get(server.url + "/v1/loads").json()["loads"]
    assert [load["model"] for load in loads] == ["second", "chat:2"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("register", {"model": "x", "path": "../new"}, 400, "is no checkpoint folder below"),
        ("register", {"model": "x y", "path": "new"}, 400, "is no name for a model"),
        ("register", {"model": "x", "path": "new", "options": {"nope": 1}}, 400, "'nope' of x is not an option"),
        ("register", {"model": "second", "path": "new"}, 409, "there is a 'second' already"),
        ("activate", {"model": "none"}, 404, "does not exist"),
        ("alias", {"alias": "second", "model": "chat"}, 400, "a model's own name"),
        ("load", {"model": "second", "modell": "x"}, 400, "modell"),
    ],
)
def test_mistakes(server: Server, path: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = httpx.post(f"{server.url}/models/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_an_active_model_is_not_forgotten(server: Server) -> None:
    answer = httpx.delete(server.url + "/v1/models/chat")
    assert answer.status_code == 400 and "is active" in answer.json()["error"]["message"]
