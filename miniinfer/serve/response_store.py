"""What the Responses API remembers, in memory and with limits: responses, their conversations, single items, and the events of background streams."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from miniinfer.serve.answers import encode
from miniinfer.serve.protocol import ApiError

MAX_STORED, MAX_STORED_BYTES, STORED_SECONDS = 1000, 256 << 20, 24 * 3600.0


class Events:
    """A stream that can be read from any place in it, while it grows. An event's place is its sequence number."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self._more = asyncio.Event()
        self._ended = False

    def add(self, events: bytes) -> None:
        """One or more whole events."""
        self.events += [event + b"\n\n" for event in events.split(b"\n\n") if event]
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def read(self, first: int) -> AsyncGenerator[bytes]:
        """The events from the one with that number on, until the stream ends."""
        while True:
            while first < len(self.events):
                first += 1
                yield self.events[first - 1]
            if self._ended:
                return
            await self._more.wait()


@dataclass(slots=True)
class Stored:
    """A response, and the conversation up to and with it (without instructions, which are not handed on)."""

    response: dict[str, Any]
    input: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    size: int = 0
    until: float = field(default_factory=lambda: time.monotonic() + STORED_SECONDS)
    task: asyncio.Task[None] | None = None  # computes it, in the background
    events: Events | None = None  # of a background stream


class Store:
    """Responses by id, in memory: the oldest go when there are too many, too much of them, or after a day. One being computed stays."""

    def __init__(self, count: int = MAX_STORED, size: int = MAX_STORED_BYTES) -> None:
        self._count, self._size = count, size
        self._held: OrderedDict[str, Stored] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}
        self._total = 0

    def put(self, stored: Stored) -> None:
        """Adds a response, or what has become of one."""
        self.drop(stored.response["id"])
        stored.size = len(encode((stored.response, stored.input, stored.messages)))
        stored.size += sum(map(len, stored.events.events)) if stored.events is not None else 0
        self._held[stored.response["id"]] = stored
        self._items |= {item["id"]: item for item in stored.response["output"]}
        self._total += stored.size
        for id in [id for id, held in self._held.items() if held.task is None or held.task.done()]:
            if len(self._held) <= self._count and self._total <= self._size and self._held[id].until > time.monotonic():
                break
            self.drop(id)

    def get(self, id: str, param: str | None = None) -> Stored:
        """ApiError 404 for one that is not, or no longer, there."""
        stored = self._held.get(id)
        if stored is None or stored.until <= time.monotonic():
            self.drop(id)
            raise ApiError(404, f"there is no response '{id}'; responses are kept in memory for a day, if 'store' is true", param=param)
        return stored

    def item(self, id: str, param: str) -> dict[str, Any]:
        """An output item of a stored response. ApiError 404 if there is none."""
        if id not in self._items:
            message = f"{param}: there is no item '{id}'; items are kept with their responses, if 'store' is true: send the item itself"
            raise ApiError(404, message, param=param)
        return self._items[id]

    def drop(self, id: str) -> None:
        if (stored := self._held.pop(id, None)) is not None:
            self._total -= stored.size
            for item in stored.response["output"]:
                self._items.pop(item["id"], None)
