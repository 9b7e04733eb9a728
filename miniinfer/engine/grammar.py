"""Structured output: grammars compiled beside the loop, and per step the masks of the tokens that outputs may go on with.

Owns the seam to a backend (`Backend`, `Matcher`; guidance.py is one), the cache of compiled grammars, the processes that try them first,
and the state of one sequence (`Constraint`), which is a function of its output tokens: preemption and resumption need nothing. A bad grammar ends its
own request; a slow one keeps only that waiting.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from miniinfer.config import ConfigError
from miniinfer.data import Request, Status, StructuredOutputsParams
from miniinfer.utils import get_logger

log = get_logger(__name__)

COMPILERS = 4  # grammars compiled at a time
COMPILE_SECONDS = 5.0  # a grammar that takes longer is refused
QUEUE_SECONDS = 30.0  # from its arrival until a request is refused whose grammar is not ready
START_SECONDS = 60.0  # of a guard: it reads the tokenizer
CACHED_GRAMMARS = 512
CACHED_BYTES = 256 << 20
STACK_BYTES = 64 << 20  # of threads that compile: more than a guard has, so what did not overflow there does not here


class Matcher(Protocol):
    """One output on its way through a grammar."""

    def fresh(self) -> Matcher:
        """Another output's, at the same place."""

    def accept(self, token: int) -> bool:
        """Moves on by a token; False, for good, if that is impossible."""

    @property
    def finished(self) -> bool:
        """Is there nothing left that could follow."""

    @property
    def error(self) -> str:
        """Why it cannot go on; "" if it can."""


class Backend(Protocol):
    """Compiles grammars for one vocabulary."""

    def compile(self, wanted: StructuredOutputsParams) -> Matcher:
        """A matcher at the start of an output; ValueError, in words for whoever wrote the grammar."""

    def fill(self, matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
        """Row i of `masks` [M, W] int32, for (matcher, i): the tokens that may come next, bit v % 32 of word v // 32 for token v."""


class Constraint:
    """One sequence's: first its grammar to come, then where its output stands in it."""

    def __init__(self, wanted: StructuredOutputsParams, compiled: Future[Matcher]) -> None:
        self._wanted, self._compiled = wanted, compiled
        self._deadline = time.monotonic() + QUEUE_SECONDS
        self._accepted = 0
        self.matcher: Matcher | None = None
        self.error: str | None = None
        self.invalid = True  # is the error the request's own fault

    @property
    def ready(self) -> bool:
        """Has it a matcher, or an error."""
        if self.matcher is None and self.error is None:
            if self._compiled.done():
                self._take(self._compiled)
            elif time.monotonic() > self._deadline:
                self.fail(f"not compiled within {QUEUE_SECONDS:.0f} seconds; try again later")
        return self.matcher is not None or self.error is not None

    def _take(self, compiled: Future[Matcher]) -> None:
        e = compiled.exception()
        if e is None:
            self.matcher = compiled.result().fresh()
            return
        self.invalid = isinstance(e, ValueError | ConfigError)
        if not self.invalid:
            log.error("a grammar could not be compiled", exc_info=e)
        self.fail(str(e) if self.invalid else type(e).__name__)

    def fail(self, why: str) -> None:
        """Nothing can follow any more."""
        self.error = f"{self._wanted.field}: {self._wanted.kind}: {why}"

    def advance(self, tokens: list[int], prompt_len: int) -> None:
        """Takes in what is new of the output."""
        assert self.matcher is not None
        for token in tokens[prompt_len + self._accepted :]:
            if self.error is None and not self.matcher.accept(token):
                self.fail(self.matcher.error)
            self._accepted += 1

    @property
    def finished(self) -> bool:
        return self.matcher is not None and self.matcher.finished


class Grammars:
    """The engine's. `load` makes the backend when the first request wants it; `guard` is what the guard processes are told (None: no guards)."""

    def __init__(
        self, load: Callable[[], Backend], guard: Callable[[], bytes] | None, vocab_size: int, eos: tuple[int, ...], rows: int, pinned: bool
    ) -> None:
        self._load, self.guard = load, guard
        self._vocab_size, self._eos, self._rows, self._pinned = vocab_size, eos, rows, pinned
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._backend: Backend | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._guards: queue.SimpleQueue[_Guard] = queue.SimpleQueue()  # idle ones
        self._cache: OrderedDict[tuple[str, str], Future[Matcher]] = OrderedDict()
        self._sizes: dict[tuple[str, str], int] = {}
        self._settled = threading.Event()
        self._buffers: np.ndarray | None = None
        self._turn = 0

    # ------------------------------------------------------------------------------------------------------ compiling

    def start(self, wanted: StructuredOutputsParams) -> Constraint:
        """A sequence's constraint; compiling it begins unless that has been done."""
        key = (wanted.kind, wanted.text)
        with self._lock:
            compiled = self._cache.get(key)
            if compiled is None:
                if self._threads is None:
                    self._threads = _threads()
                compiled = self._cache[key] = self._threads.submit(self._compile, key, wanted)
                self._sizes[key] = len(wanted.text)
                compiled.add_done_callback(lambda _: self._settled.set())
            self._cache.move_to_end(key)
            while len(self._cache) > CACHED_GRAMMARS or (len(self._cache) > 1 and sum(self._sizes.values()) > CACHED_BYTES):
                oldest, _ = self._cache.popitem(last=False)
                del self._sizes[oldest]
        return Constraint(wanted, compiled)

    def wait(self, seconds: float) -> None:
        """Returns when a grammar has been compiled, or after so long."""
        self._settled.wait(seconds)
        self._settled.clear()

    def _compile(self, key: tuple[str, str], wanted: StructuredOutputsParams) -> Matcher:
        with self._loading:
            if self._backend is None:
                self._backend = self._load()
        if self.guard is not None:
            size = self._try(self.guard, wanted)
            with self._lock:
                if key in self._sizes:
                    self._sizes[key] += size
        return self._backend.compile(wanted)

    def _try(self, start: Callable[[], bytes], wanted: StructuredOutputsParams) -> int:
        """Has a guard compile it first. ValueError if that fails, or takes too much time or memory; else about how many bytes it takes."""
        try:
            guard = self._guards.get_nowait()
        except queue.Empty:
            guard = _Guard(start())
        try:
            error, size = guard.ask(msgspec.json.encode(wanted), COMPILE_SECONDS)
        except TimeoutError:
            guard.kill()
            raise ValueError(f"it takes longer than {COMPILE_SECONDS:.0f} seconds to compile; make it simpler") from None
        except EOFError:
            guard.kill()
            raise ValueError("it is too large or too deeply nested to compile; make it simpler") from None
        self._guards.put(guard)
        if error:
            raise ValueError(error)
        return size

    # ---------------------------------------------------------------------------------------------------------- masks

    def masks(self, requests: list[Request]) -> np.ndarray:
        """What each of these may go on with after the tokens it has, [len(requests), W] int32; stays as it is until the call after the next.
        Whatever the mask, one that has ended is drawn for in vain."""
        if self._buffers is None:
            words = -(-self._vocab_size // 32)
            self._buffers = torch.zeros(2, self._rows, words, dtype=torch.int32, pin_memory=self._pinned).numpy()
        masks = self._buffers[self._turn][: len(requests)]
        self._turn ^= 1
        open_ones = [(r, i) for i, r in enumerate(requests) if r.status is not Status.FINISHED and r.constraint.error is None]
        for request, _ in open_ones:  # a resumed output is new to its constraint
            request.constraint.advance(request.tokens, request.prompt_len)
        if len(open_ones) < len(requests):
            masks[:] = -1
        if open_ones:
            assert self._backend is not None
            self._backend.fill([(r.constraint.matcher, i) for r, i in open_ones], masks)
        for request, i in open_ones:
            if why := request.constraint.matcher.error:
                request.constraint.fail(why)
            params = request.params
            early = len(request.tokens) - request.prompt_len < params.min_tokens
            if early or params.ignore_eos:
                _hold_back(masks[i], (*self._eos, *(request.stop_ids if early else ())))
        return masks

    def shutdown(self) -> None:
        """Ends threads and guards."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._guards.empty():
            self._guards.get().kill()


def _hold_back(mask: np.ndarray, ids: tuple[int, ...]) -> None:
    """Takes these out, unless nothing else would be left: an output that is complete has to end."""
    words = mask.view(np.uint32)
    before = {id // 32: words[id // 32] for id in ids if words[id // 32] >> np.uint32(id % 32) & 1}
    for id in ids:
        words[id // 32] &= ~np.uint32(1 << id % 32)
    if before and not words.any():
        for at, word in before.items():
            words[at] = word


def _threads() -> ThreadPoolExecutor:
    """With deep stacks, which Python has as a setting of the process: back to what it was once they run."""
    before = threading.stack_size(STACK_BYTES)
    try:
        threads = ThreadPoolExecutor(COMPILERS, "grammar")
        gate = threading.Barrier(COMPILERS + 1)
        for _ in range(COMPILERS):
            threads.submit(gate.wait)
        gate.wait()
        return threads
    finally:
        threading.stack_size(before)


class _Guard:
    """A process that compiles a grammar before the engine's own does: see guidance.py."""

    def __init__(self, start: bytes) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "miniinfer.engine.guidance"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        self.ask(start, START_SECONDS)

    def ask(self, line: bytes, seconds: float) -> tuple[str, int]:
        """What is wrong ("": nothing), and the bytes that it took. TimeoutError, or EOFError if the process has died of it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(line + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        if not select.select([stdout], [], [], seconds)[0]:
            raise TimeoutError
        answer = stdout.readline()
        if not answer:
            raise EOFError
        return msgspec.json.decode(answer, type=tuple[str, int])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def grammars(folder: Callable[[], Path], vocab_size: int, eos: tuple[int, ...], rows: int, pinned: bool) -> Grammars:
    """Through llguidance, which is imported when the first request wants it. `folder` tells where the tokenizer is; ConfigError if there is none."""

    def load() -> Backend:
        from miniinfer.engine import guidance

        return guidance.Backend(folder(), vocab_size, list(eos))

    return Grammars(load, lambda: msgspec.json.encode([str(folder()), vocab_size, list(eos)]), vocab_size, eos, rows, pinned)
