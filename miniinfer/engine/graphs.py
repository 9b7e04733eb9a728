"""CUDA graphs of whole steps: one per shape of a step, captured lazily over the runner's fixed buffers.

Owns shapes, their padding and the captures. What is captured is the runner's own function of a shape, so a graph only skips Python. Padding
is decided by a step's size alone, captured or not, so that whether a step is replayed never changes its results.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniinfer.utils import get_logger

log = get_logger(__name__)

MAX_GRAPHS = 128  # the least recently used goes first; a graph of 300 kernels takes about a megabyte, a new one about two eager steps

# What a step ends with: the hidden states that logits are made of, or tokens drawn without or with filters.
HIDDEN, DRAW, FILTERED_DRAW = range(3)


class Shape(NamedTuple):
    """What a step's kernels are launched for. All else that a step does follows from device memory, so one graph serves all steps of a shape."""

    tokens: int
    sequences: int
    max_query: int  # bounds; max_query 1: every sequence has one token
    max_length: int
    ending: int


def sequence_sizes(limit: int) -> list[int]:
    """Batch sizes of decode steps, up to `limit`: those of kernels' tiles while a step reads weights, closer together where padding costs."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 160, 192, 224, 256]
    sizes += range(320, limit + 64, 64)
    return [s for s in sizes if s < limit] + [limit]


def token_sizes(limit: int) -> list[int]:
    """Sizes of steps with prompts in them: likewise, from 128 on a quarter apart, and an eighth while such a step computes more than it reads."""
    sizes = [4, 8, 16, 32, 64, 128]
    while sizes[-1] < limit:
        parts = 4 if sizes[-1] < 512 else 8
        sizes += [sizes[-1] * (parts + i) // parts for i in range(1, parts + 1)]
    return [s for s in sizes if s < limit] + [limit]


class Graphs:
    """Replays `step(shape)`. With `enabled` False nothing is padded and `run` calls it; steps of prompts are captured up to `max_tokens` tokens."""

    def __init__(self, step: Callable[[Shape], Tensor], max_sequences: int, max_tokens: int, max_length: int, enabled: bool) -> None:
        self.step, self.max_length, self.enabled = step, max_length, enabled
        self.sequences = sequence_sizes(max_sequences)
        self.mixed_sequences = sorted({min(1 << i, max_sequences) for i in range(max_sequences.bit_length() + 1)})
        self.tokens = token_sizes(max_tokens) if max_tokens else []
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # the most recently used last
        self._met: set[Shape] = set()  # prompt shapes that have come once
        self._pool: Any = None  # one memory pool for all captures: they never run at the same time
        self._stream: torch.cuda.Stream | None = None

    def pad(self, tokens: int, sequences: int) -> tuple[int, int] | None:
        """The (tokens, sequences) that a step is padded to; None for one that takes no graph."""
        if not self.enabled:
            return None
        if tokens == sequences:
            size = self.sequences[bisect_left(self.sequences, sequences)]
            return size, size
        if not self.tokens or tokens > self.tokens[-1]:
            return None
        return self.tokens[bisect_left(self.tokens, tokens)], self.mixed_sequences[bisect_left(self.mixed_sequences, sequences)]

    def run(self, shape: Shape) -> Tensor:
        """A padded step. The first of a shape runs eagerly, which also compiles and warms up its kernels.

        It is captured behind that, a shape with prompts only when it comes again: of those there are many, and most are rare."""
        found = self.captured.pop(shape, None)
        if found is not None:
            self.captured[shape] = found
            graph, output = found
            graph.replay()
            return output
        result = self.step(shape)
        if shape.max_query == 1 or shape in self._met:
            self._capture(shape)
        else:
            self._met.add(shape)
        return result

    def _capture(self, shape: Shape) -> None:
        begin = time.perf_counter()
        if len(self.captured) >= MAX_GRAPHS:
            torch.cuda.synchronize()  # it may be running
            del self.captured[next(iter(self.captured))]
        self._stream = self._stream or torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would wait for the device and empty the allocator's cache first. "thread_local": other threads (a tokenizer, a data
        # loader) may go on calling CUDA meanwhile.
        # A garbage collection in between might free another engine's graphs, which ends the capture with an error.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    output = self.step(shape)
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        self._pool = self._pool or graph.pool()
        self.captured[shape] = (graph, output)
        log.debug("captured %s in %.0f ms", shape, 1e3 * (time.perf_counter() - begin))
