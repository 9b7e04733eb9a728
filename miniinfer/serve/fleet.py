"""Several models behind one address: what they are called, which of them are in memory, and who makes room for whom.

Owns names (versions, aliases), loading on demand, and putting models away. The life of a request on its model is service.py's; how a command line
or a client names models is models.py's. A request first finds its model's service here (`read`); the engine behind it may be asleep or not there at
all until the request needs it (`hold`). One model at a time is brought into memory. If there is no room, the model that has been idle longest goes;
a busy one is given PATIENCE seconds to become idle, after which its new requests wait until it has been away and come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request

from miniinfer.config import ConfigError, EngineConfig, ServerConfig, read_generation_config
from miniinfer.engine.client import AsyncEngine, EngineDeadError
from miniinfer.models.hub import BUNDLED
from miniinfer.serve.admission import Gate
from miniinfer.serve.auth import Keys
from miniinfer.serve.logs import log_request
from miniinfer.serve.metrics import Metrics
from miniinfer.serve.protocol import ApiError, parse
from miniinfer.serve.record import Sink
from miniinfer.serve.service import Service, read_body
from miniinfer.serve.specs import NAME
from miniinfer.serve.tracing import Tracer
from miniinfer.utils import get_logger

log = get_logger(__name__)

PATIENCE = 2.0  # seconds that a busy model may go on taking requests while another waits for its room
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # taken from generation_config.json

State = Literal["unloaded", "loading", "loaded", "sleeping"]
MakeEngine = Callable[[EngineConfig, ServerConfig], AsyncEngine]


def _new_engine(config: EngineConfig, server: ServerConfig) -> AsyncEngine:
    return AsyncEngine(config, chat_template=server.chat_template)


class Member:
    """A model of the fleet: how to run it and, from its first load on, its service."""

    def __init__(self, name: str, config: EngineConfig, server: ServerConfig) -> None:
        self.name, self.config, self.server = name, config, server
        self.created = int(time.time())
        self.service: Service | None = None
        self.state: State = "unloaded"
        self.running = 0  # requests that have its engine
        self.waiting = 0  # and those that want it
        self.used = time.monotonic()  # when a request last had it
        self.leaving = False  # it is to go as soon as no request has it
        self.quiet = asyncio.Event()  # nobody has it
        self.quiet.set()
        self.bringing: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self.running + self.waiting > 0

    def card(self, name: str | None = None) -> dict[str, Any]:
        """What /v1/models says of it, under its own name or another of its names."""
        service = self.service
        length = service.engine.info.get("max_model_len") if service is not None else self.config.max_model_len
        return {
            "id": name or self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "miniinfer",
            "root": self.name,
            "max_model_len": length,
            "status": {"value": self.state},
        }


class Fleet:
    """The models of a server, the first of which is for requests that name none."""

    def __init__(self, config: ServerConfig, members: list[Member], make_engine: MakeEngine = _new_engine) -> None:
        self.config, self._make_engine = config, make_engine
        self.gate = Gate(config)
        self.members = {member.name: member for member in members}
        self.aliases: dict[str, str] = {}  # other names of models, and of bare names
        self.active: dict[str, str] = {}  # of a model with versions, the one that its bare name means
        for member in members:
            self.active.setdefault(_bare(member.name), member.name)
        self._first = _bare(members[0].name)
        self.pins: dict[Any, Any] = {}  # what is pinned, by owner and name: prefixes.py's
        for text in config.model_alias or []:
            self.alias(*text.partition("=")[::2])
        self.sinks: list[Sink] = [log_request]  # told of every HTTP request when it has ended
        if config.otlp_endpoint is not None:
            self.sinks.append(Tracer(config.otlp_endpoint))
        self._turn = asyncio.Lock()  # to change what is in memory
        self._sweeper: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # keeps tasks alive that nobody awaits

    @classmethod
    def of(cls, service: Service) -> Fleet:
        """One model that is there and stays."""
        member = Member(service.model, EngineConfig(), service.config)
        fleet = cls(service.config, [member])
        fleet.gate = service.gate
        fleet._adopt(member, service)
        return fleet

    # ------------------------------------------------------------------------------------------------------- names

    def find(self, name: str | None) -> Member:
        """The model of a name, or the first. ApiError 404 if there is none."""
        if name is None:
            name = self._first
        member = self._known(name) or self._known(name.removesuffix(":latest"))  # which Ollama's clients add
        if member is None:
            names = ", ".join(f"'{name}'" for name in self.names)
            raise ApiError(404, f"the model '{name}' does not exist; this server has {names}", param="model", code="model_not_found")
        return member

    def _known(self, name: str) -> Member | None:
        target = self.aliases.get(name, name)
        return self.members.get(self.active.get(target, target))

    def add(self, member: Member) -> Member:
        """A new model, not loaded yet. ApiError 409 if its name is taken."""
        if member.name in self.names:
            raise ApiError(409, f"model: there is a '{member.name}' already; give a version, as in {_bare(member.name)}:2", param="model")
        self.members[member.name] = member
        self.active.setdefault(_bare(member.name), member.name)
        return member

    def alias(self, name: str, target: str) -> None:
        """Another name for a model; one that was an alias before is moved. ApiError 404 if there is no such model, 400 for a name that cannot be."""
        if not re.fullmatch(NAME, name) or name in self.members or name in self.active:
            raise ApiError(400, f"alias: {name!r} is a model's own name, or none at all", param="alias")
        self.find(target)
        self.aliases[name] = self.aliases.get(target, target)

    async def activate(self, member: Member, keep_previous: bool) -> None:
        """The bare name means this version from when it is in memory. ApiError 503 if it cannot be loaded: then nothing has changed."""
        bare = _bare(member.name)
        async with self.hold(member):
            previous, self.active[bare] = self.members[self.active[bare]], member.name
        log.info("%s: now %s", bare, member.name)
        if previous is not member and not keep_previous and previous.state != "unloaded":
            self._leaving.add(task := asyncio.create_task(self.unload(previous)))
            task.add_done_callback(self._leaving.discard)

    async def remove(self, name: str) -> None:
        """Forgets an alias, or a model that its bare name does not mean, once its requests have ended. ApiError 400 if it is in use under a name."""
        if self.aliases.pop(name, None) is not None:
            return
        member = self.find(name)
        if self.active[_bare(member.name)] == member.name or member.name in self.aliases.values():
            raise ApiError(400, f"model: '{member.name}' is active; activate another version, and move its aliases, first", param="model")
        await self.unload(member)
        self.members.pop(member.name, None)

    @property
    def names(self) -> list[str]:
        """All names that a request may use: models, bare names of those with versions, aliases."""
        return list(dict.fromkeys([*self.members, *self.active, *self.aliases]))

    def cards(self) -> list[dict[str, Any]]:
        return [self.find(name).card(name) for name in self.names]

    @property
    def keys(self) -> Keys | None:
        return self.gate.keys

    # ---------------------------------------------------------------------------------------------------- requests

    @property
    def changes(self) -> bool:
        """Do models come and go here."""
        return len(self.members) > 1 or self.config.model_idle_seconds > 0

    @property
    def default(self) -> Service:
        """The first model's service; it is loaded before the server listens."""
        service = self.find(None).service
        assert service is not None
        return service

    @property
    def status(self) -> str:
        """ "ok" if the server takes work. Of several models one that died is no hindrance: the next request brings it back."""
        if self.gate.draining:
            return "draining"
        engine, member = self.default.engine, self.find(None)
        if len(self.members) > 1 or member.state != "loaded" or engine.is_alive and not engine.restarting:
            return "ok"
        return "restarting" if engine.is_alive else "engine dead"

    @property
    def services(self) -> list[Service]:
        """Of the models that have been loaded at least once."""
        return [member.service for member in self.members.values() if member.service is not None]

    def metrics(self) -> list[Metrics]:
        return [service.metrics for service in self.services]

    @property
    def unfinished(self) -> int:
        return sum(service.unfinished for service in self.services)

    def abort_all(self) -> None:
        for service in self.services:
            service.abort_all()

    async def body(self, http: Request, kind: type[Any], any_type: bool = False) -> Any:
        """The checked body, if the server takes work at all; `any_type`: whatever its head says of its content."""
        self.gate.admit(0)
        kind_of_body = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind_of_body != "application/json" and not any_type:
            raise ApiError(415, f"the content type must be application/json, got {kind_of_body!r}")
        return parse(kind, await read_body(http, self.config.max_body_mib))

    async def read(self, http: Request, kind: type[Any], any_type: bool = False) -> tuple[Service, Any]:
        """The checked request and its model's service."""
        request = await self.body(http, kind, any_type)
        service = await self.service(request.model)
        http.state.metrics = service.metrics
        return service, request

    async def service(self, name: str | None) -> Service:
        """The service of a model, which is loaded if it never was. ApiError 404 for an unknown name, 503 if it cannot be loaded."""
        member = self.find(name)
        if member.service is None:
            await self._bring(member)
        assert member.service is not None
        return member.service

    # ------------------------------------------------------------------------------------------- in memory and away

    @contextlib.asynccontextmanager
    async def hold(self, member: Member) -> AsyncGenerator[None]:
        """The model in memory for as long as this lasts. ApiError 503 if it cannot be brought there."""
        member.waiting += 1
        try:
            while member.state != "loaded" or member.leaving:
                await self._bring(member)
            member.running += 1
        finally:
            member.waiting -= 1
        member.quiet.clear()
        try:
            yield
        finally:
            member.running -= 1
            member.used = time.monotonic()
            if not member.running:
                member.quiet.set()

    async def load(self, member: Member) -> None:
        """Brings a model into memory. ApiError 503 if that fails."""
        while member.state != "loaded" or member.leaving:
            await self._bring(member)

    async def unload(self, member: Member) -> None:
        """Ends a model's engine, as soon as no request has it; the next request brings it back."""
        async with self._turn:
            if member.state != "unloaded":
                await self._put_away(member, for_good=True)

    async def _bring(self, member: Member) -> None:
        """One task does it for all who wait; whoever gives up waiting does not stop it."""
        if member.bringing is None:
            member.bringing = asyncio.create_task(self._into_memory(member))
            member.bringing.add_done_callback(lambda task: _done(member, task))
        await asyncio.shield(member.bringing)

    async def _into_memory(self, member: Member) -> None:
        async with self._turn:
            if member.state == "loaded":
                return
            await self._make_room(member)
            start, was = time.monotonic(), member.state
            try:
                if was == "sleeping":
                    assert member.service is not None
                    await member.service.engine.wake_up()
                else:
                    member.state = "loading"
                    self._adopt(member, await self._started(member))
            except (ConfigError, EngineDeadError, OSError, RuntimeError) as e:
                if was == "sleeping":
                    assert member.service is not None
                    await member.service.engine.shutdown()
                member.state = "unloaded"
                raise ApiError(503, f"the model '{member.name}' could not be loaded: {e}") from None
            member.state, member.used = "loaded", time.monotonic()
            log.info("%s: %s in %.2f s", member.name, "awake" if was == "sleeping" else "loaded", time.monotonic() - start)

    async def _started(self, member: Member) -> Service:
        engine = self._make_engine(member.config, member.server)
        if member.service is not None:
            engine.pins = member.service.engine.pins
        await engine.start()
        defaults = sampling_defaults(engine.info)
        if member.service is None:
            return Service(engine, member.server, member.name, defaults, self.gate)
        member.service.engine, member.service.defaults = engine, defaults
        return member.service

    def _adopt(self, member: Member, service: Service) -> None:
        """A service whose engine runs becomes its model's."""
        member.service, member.state = service, "loaded"
        service.hold = lambda: self._held(member)

    def _held(self, member: Member) -> AbstractAsyncContextManager[None]:
        if len(self.members) > 1 and member.state == "loaded" and member.service is not None and member.service.engine.errored:
            member.state = "unloaded"  # it died for good: where models come and go, another is started
        return self.hold(member)

    async def _make_room(self, member: Member) -> None:
        while short := self._short(member):
            others = [other for other in self.members.values() if other.state == "loaded" and other is not member]
            if not others:
                raise ApiError(503, f"the model '{member.name}' cannot be loaded: {short}")
            await self._put_away(min(others, key=lambda other: (other.busy, other.used)))

    def _short(self, member: Member) -> str:
        """What there is too little of for another model beside those in memory; empty if it fits."""
        there = [other for other in self.members.values() if other.state == "loaded"]
        most = self.config.max_loaded_models
        if most and len(there) >= most:
            return f"{most} models at once (max_loaded_models)"
        if any(service.engine.info.get("device", "cpu") != "cpu" for service in self.services):
            share = sum(other.config.gpu_memory_utilization for other in (*there, member))
            return f"{100 * share:.0f} % of the GPU's memory (the sum of gpu_memory_utilization)" if there and share > 1 else ""
        need, free = _bytes_of(member.config), _available()
        return f"{need / 2**30:.1f} GiB for its weights, of which {free / 2**30:.1f} are free" if need > free else ""

    async def _put_away(self, member: Member, for_good: bool = False) -> None:
        """To sleep if its engine can, else out of memory. Requests that come meanwhile wait for its return."""
        if member.busy:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    while member.busy:
                        await member.quiet.wait()
                        await asyncio.sleep(0)
        member.leaving = True
        try:
            await member.quiet.wait()
            engine = member.service.engine if member.service is not None else None
            assert engine is not None
            if member.config.enable_sleep_mode and not for_good and await _asleep(engine, member.name):
                member.state = "sleeping"
            else:
                await engine.shutdown()
                member.state = "unloaded"
        finally:
            member.leaving = False
        log.info("%s: %s", member.name, member.state)

    # ------------------------------------------------------------------------------------------------------ its life

    def adopt(self, engine: AsyncEngine) -> None:
        """The first model's engine, started by the caller."""
        member = self.find(None)
        self._adopt(member, Service(engine, member.server, member.name, sampling_defaults(engine.info), self.gate))
        if self.config.model_idle_seconds:
            self._sweeper = asyncio.create_task(self._sweep(self.config.model_idle_seconds))

    async def _sweep(self, seconds: float) -> None:
        """Puts away what nobody has asked for in so long."""
        while True:
            ends = [seconds + member.used for member in self.members.values() if member.state == "loaded" and not member.busy]
            await asyncio.sleep(max(0.02, min(ends, default=time.monotonic() + seconds) - time.monotonic()))
            for member in list(self.members.values()):
                async with self._turn:
                    if member.state == "loaded" and not member.busy and time.monotonic() - member.used >= seconds:
                        await self._put_away(member)

    async def shutdown(self) -> None:
        """Ends all engines."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [*self._leaving, *(member.bringing for member in self.members.values() if member.bringing is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(service.templates.close() for service in self.services))
        await asyncio.gather(*(service.engine.shutdown() for service in self.services))


def _bare(name: str) -> str:
    """A model's name without its version: chat of chat:2."""
    return name.rpartition(":")[0] or name


async def _asleep(engine: AsyncEngine, name: str) -> bool:
    """Puts an engine to sleep; False if it cannot, be it that host memory has no room for its weights."""
    try:
        await engine.sleep(1)
    except (RuntimeError, OSError, ValueError) as e:
        log.warning("%s: ended, because it could not be put to sleep: %s", name, e)
        return False
    return True


def _done(member: Member, task: asyncio.Task[None]) -> None:
    member.bringing = None
    if not task.cancelled():
        task.exception()  # all who waited may have gone


def sampling_defaults(info: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's own recommendation, which holds for what a client leaves open."""
    values = read_generation_config(Path(info["folder"]))
    return {name: values[name] for name in _SAMPLING_DEFAULTS if values.get(name) is not None}


def _bytes_of(config: EngineConfig) -> int:
    """Of the weights' files; 0 where they are not known or not here yet."""
    folder = BUNDLED if config.model == "bundled" else Path(config.model).expanduser()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() and config.load_format != "dummy" else 0


def _available() -> int:
    """Bytes of memory that new processes could have."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 1 << 62  # not Linux: unknown
