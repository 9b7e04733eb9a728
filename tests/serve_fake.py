"""An engine without a model, behind the real server: it writes what a test tells it to. For tests of everything above AsyncEngine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from miniinfer.config import ServerConfig
from miniinfer.data import RequestOutput, SamplingParams, SequenceUpdate, TokenLogprobs
from miniinfer.engine.client import EngineAsleepError, EngineDeadError
from miniinfer.engine.output import OutputProcessor, validate
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.server import Uvicorn, uvicorn_config
from miniinfer.serve.service import Service

END = 2  # <|im_end|>


class FakeEngine:
    """AsyncEngine's interface. `reply` makes the answer from the prompt's text; one token a step, then END unless max_tokens comes first.

    Token t has log-probability -t/1000, and its two best alternatives are t+1 and t+2 with less."""

    def __init__(self, tokenizer: Tokenizer | None, reply: Callable[[str], str] = lambda prompt: "hello there", max_model_len: int = 512) -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.info: dict[str, Any] = {"max_model_len": max_model_len, "vocab_size": 320, "page_size": 16, "num_pages": [100]}
        self.pins: dict[str, tuple[list[int], str]] = {}
        self.stats: dict[str, float] = {"running": 0.0}
        self.processor = OutputProcessor(tokenizer, deltas=True)
        self.is_alive, self.restarting, self.errored = True, False, False
        self.delay = 0.0
        self.gate: asyncio.Event | None = None  # if set, nothing is produced before it
        self.die_after: int | None = None  # tokens
        self.seen: list[tuple[list[int], SamplingParams, int, str]] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self._abort: set[str] = set()
        self.can_sleep, self.sleep_level, self.no_room = False, 0, False
        self.changes: list[Any] = []  # what sleep and wake_up were asked

    @property
    def is_sleeping(self) -> bool:
        return self.sleep_level > 0

    async def sleep(self, level: int = 1, mode: str = "wait", tags: list[str] | None = None) -> dict[str, Any]:
        if not self.can_sleep:
            raise ValueError("enable_sleep_mode: the engine was started without it, so it cannot sleep")
        self.changes.append((level, mode, tags))
        self.sleep_level = level
        return {"level": level, "asleep": tags or ["weights", "kv_cache"], "bytes": 7}

    async def wake_up(self, tags: list[str] | None = None) -> dict[str, Any]:
        self.changes.append(tags)
        if self.no_room:
            raise RuntimeError("the GPU has no 1.00 GiB free")
        self.sleep_level = 0
        return {"level": 0, "asleep": [], "bytes": 7}

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("prompt: there is no tokenizer; give token ids")
        return self.tokenizer.encode(text, add_special_tokens)

    async def pin(self, id: str, tokens: list[int], cache_salt: str = "") -> RequestOutput:
        outputs = [out async for out in self.generate(tokens, SamplingParams(max_tokens=1), id, cache_salt=cache_salt, delta=True)]
        self.pins[id] = tokens, cache_salt
        return outputs[-1]

    def unpin(self, id: str) -> None:
        self.pins.pop(id, None)

    async def control(self, command: str) -> Any:
        assert command == "pins"
        return {id: {"pages": len(tokens) // 16, "resident": len(tokens) // 16, "hits": 7} for id, (tokens, _) in self.pins.items()}

    def abort(self, request_id: str) -> None:
        self._abort.add(request_id)

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        delta: bool = False,
        pooling: str | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        assert delta
        validate(prompt, params, self.info, self.tokenizer, pooling is not None)
        if self.is_sleeping:
            raise EngineAsleepError("the engine is asleep: it takes no requests until it is woken up")
        self.seen.append((prompt, params, priority, cache_salt))
        ids = [add.id for add in self.processor.add(request_id, None, prompt, params)]
        self.open.add(request_id)
        try:
            if pooling is not None:
                vector = [float(prompt[-1] if pooling == "last" else sum(prompt) / len(prompt)), 2.0, -1.0]
                yield self.processor.process([SequenceUpdate(ids[0], [], "stop", cached_tokens=3, embedding=vector)])[0][0]
                return
            text = self.tokenizer.decode(prompt, skip_special_tokens=False) if self.tokenizer else ""
            tokens = ([*self.tokenizer.encode(self.reply(text)), END] if self.tokenizer else [5, 6, 7])[: params.max_tokens]
            for i, token in enumerate(tokens):
                if self.gate is not None:
                    await self.gate.wait()
                await asyncio.sleep(self.delay)
                if self.die_after is not None and i >= self.die_after:
                    self.is_alive = False
                    raise EngineDeadError("killed by a test")
                last = "abort" if request_id in self._abort else "stop" if token == END else "length" if i + 1 == len(tokens) else None
                updates = [self._update(id, token, last, prompt if i == 0 else None) for id in ids]
                for out in self.processor.process(updates)[0]:
                    yield out
                    if out.finished:
                        return
        finally:
            self.open.discard(request_id)
            if self.processor.drop([request_id]):
                self.aborted.append(request_id)

    def _update(self, id: str, token: int, finish: str | None, prompt: list[int] | None) -> SequenceUpdate:
        def table(t: int) -> TokenLogprobs:
            return TokenLogprobs([t, t + 1, t + 2], [-t / 1000, -t / 1000 - 1, float("-inf")], [1, 2, 3])

        scored = None if prompt is None else [table(t) for t in prompt[1:]]
        return SequenceUpdate(id, [token], finish, logprobs=[table(token)], prompt_logprobs=scored, cached_tokens=3)


class Server:
    """The real server over an engine, or over the fleet that it is the first of, in a thread of this process."""

    def __init__(self, engine: Any, model: str = "tiny", defaults: dict[str, Any] | None = None, fleet: Fleet | None = None, **options: Any) -> None:
        self.engine = engine
        self.fleet = fleet or Fleet.of(Service(engine, ServerConfig(**options), model, defaults or {}))
        self.api = self.fleet.default
        self.uvicorn = Uvicorn(uvicorn_config(self.fleet))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> Server:
        self.thread.start()
        while not self.uvicorn.started:
            self.thread.join(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join(10)


def read_events(body: bytes) -> list[Any]:
    """The JSON of a stream's events; checks the framing."""
    *events, done, end = body.decode().split("\n\n")
    assert done == "data: [DONE]" and end == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event[6:]) for event in events]
