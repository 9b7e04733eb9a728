"""CUDA graphs of decode steps: captured lazily, one per batch-size bucket, over the runner's fixed buffers.

Owns buckets and captures; what is captured is the runner's own forward function, so a graph only skips Python.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miniinfer.utils import get_logger

log = get_logger(__name__)


def buckets(limit: int) -> list[int]:
    """Batch sizes to capture up to `limit`: close together where padding would cost, few enough to capture in passing."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
    sizes += range(320, limit + 64, 64)
    return [s for s in sizes if s < limit] + [limit]


class Graphs:
    """Replays `forward(size)` for a bucket size; with `enabled` False it calls it."""

    def __init__(self, forward: Callable[[int], Tensor], limit: int, enabled: bool) -> None:
        self.forward, self.sizes, self.enabled = forward, buckets(limit), enabled
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None  # one memory pool for all captures: they never run at the same time

    def bucket(self, size: int) -> int:
        """The batch size that `size` entries are padded to: the size itself without graphs."""
        return self.sizes[bisect_left(self.sizes, size)] if self.enabled else size

    def run(self, size: int) -> Tensor:
        """The forward pass of a padded batch of `size` one-token entries.

        A bucket's first step runs eagerly, which also compiles and warms up its kernels, and is captured behind that for the next."""
        if not self.enabled:
            return self.forward(size)
        if size in self.captured:
            graph, output = self.captured[size]
            graph.replay()
            return output
        result = self.forward(size)
        self._capture(size)
        return result

    def _capture(self, size: int) -> None:
        begin = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads (a tokenizer, a data loader) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.forward(size)
        self.pool = self.pool or graph.pool()
        self.captured[size] = (graph, output)
        log.debug("captured decode graph for batch %d in %.0f ms", size, 1e3 * (time.perf_counter() - begin))
