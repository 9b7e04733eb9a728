"""Sleep: an engine's weights and KV pages in arenas, what becomes of them while it sleeps, and how they come back.

Owns which parts sleep and how deeply, and the copy of the weights in host memory. How memory is given back and had again at its old addresses is
arena.py's; that nothing runs meanwhile is core.py's care.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from miniinfer.data import SLEEP_TAGS
from miniinfer.engine.arena import Arena, Wanted, make_arena, trim_heap

WEIGHTS, KV_CACHE = SLEEP_TAGS
CHUNK = 256 << 20  # bytes of a piece of pinned memory; torch's allocator of it rounds up to powers of two


class Memory:
    """A model's weights and KV pages. The engine's parts take their tensors from `weights` and `kv`, once each is made at its full size.

    Sleep of level 1 keeps the weights in host memory (on the CPU, where they are), of level 2 drops them. KV pages are dropped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: Arena
        self.kv: Arena
        self.reload: Callable[[], None]  # reads the weights as at the start
        self.forget: Callable[[], None] = lambda: None  # drops what was made of the weights; `reload` makes it anew
        self.asleep: dict[str, int] = {}  # how deeply each part sleeps
        self._copy = _HostCopy()

    def make_weights(self, size: int) -> None:
        self.weights = make_arena(size, self.device)

    def make_kv(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """Zeros for each layer."""
        wanted = Wanted()
        for shape in shapes:
            wanted.take(shape, dtype)
        self.kv = make_arena(wanted.size, self.device)
        self._clear()
        return [self.kv.take(shape, dtype) for shape in shapes]

    def sleep(self, level: int, tags: Collection[str]) -> dict[str, Any]:
        """Puts parts to sleep; one that sleeps already may sleep more deeply, but not less. Nothing may be running."""
        begin, before = time.perf_counter(), self._held()
        gpu = self.device.type == "cuda"
        if WEIGHTS in tags and level > self.asleep.get(WEIGHTS, 0):
            if level == 1 and gpu:
                self._copy.save(self.weights.bytes)
            elif level == 2:
                self._copy.drop()
                self.forget()
            if level == 2 or gpu:
                self.weights.release()
            self.asleep[WEIGHTS] = level
        if KV_CACHE in tags:
            self.kv.release()
            self.asleep[KV_CACHE] = 1
        if gpu:
            torch.cuda.empty_cache()
        else:
            trim_heap()
        return self._report(before - self._held(), begin)

    def wake(self, tags: Collection[str]) -> dict[str, Any]:
        """Brings parts back; those that are awake stay as they are. Where that fails (memory is short, the checkpoint is gone) all that were asleep
        still are: RuntimeError or ConfigError."""
        begin, before = time.perf_counter(), self._held()
        wanted = [tag for tag in SLEEP_TAGS if tag in tags and tag in self.asleep]
        arenas = [self.weights if tag == WEIGHTS else self.kv for tag in wanted]
        there = [arena.mapped for arena in arenas]
        try:
            for arena in arenas:
                arena.restore()
            if WEIGHTS in wanted:
                self._fill()
            if KV_CACHE in wanted:
                self._clear()
            self._wait()
        except BaseException:
            self._wait()
            for arena, mapped in zip(arenas, there, strict=True):
                if not mapped:
                    arena.release()
            raise
        for tag in wanted:
            del self.asleep[tag]
        return self._report(self._held() - before, begin)

    @property
    def level(self) -> int:
        """0: awake, all of it; 1 or 2: some of it sleeps, the weights as deeply as this says."""
        return max(self.asleep.values(), default=0)

    def _fill(self) -> None:
        if self.asleep[WEIGHTS] == 2:
            self.reload()
        elif self.device.type == "cuda":
            self._copy.load(self.weights.bytes)

    def _clear(self) -> None:
        """Attention multiplies masked entries by 0, and 0 times a NaN that was left there would be NaN. On the CPU they are zero already."""
        if self.device.type == "cuda":
            self.kv.bytes.zero_()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _held(self) -> int:
        """Bytes of the device."""
        arenas = sum(arena.size for arena in (self.weights, self.kv) if arena.mapped)
        return arenas + (torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0)

    def _report(self, moved: int, begin: float) -> dict[str, Any]:
        return {
            "level": self.level,
            "asleep": [tag for tag in SLEEP_TAGS if tag in self.asleep],
            "bytes": moved,
            "held_bytes": self._held(),
            "host_bytes": self._copy.size,
            "seconds": round(time.perf_counter() - begin, 4),
        }


class _HostCopy:
    """A copy in pinned memory. The memory is kept for the next time: to get it takes several times as long as to copy into it."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    @property
    def size(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def save(self, values: Tensor) -> None:
        """Complete when it returns."""
        chunks = self._chunks
        for i, piece in enumerate(values.split(CHUNK)):
            if i == len(chunks):
                chunks.append(torch.empty(len(piece), dtype=torch.uint8, pin_memory=True))
            chunks[i].copy_(piece, non_blocking=True)  # while the next piece of memory is got
        torch.cuda.synchronize(values.device)

    def load(self, values: Tensor) -> None:
        """Complete once the device gets there."""
        for chunk, piece in zip(self._chunks, values.split(CHUNK), strict=True):
            piece.copy_(chunk, non_blocking=True)

    def drop(self) -> None:
        """The memory goes back to the system (with torch before 2.13 into torch's own store, for the next time)."""
        if self._chunks:
            self._chunks.clear()
            getattr(torch.accelerator, "empty_host_cache", lambda: None)()
