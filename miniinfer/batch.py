"""Batch: the tensors of one forward pass, handed to the model as its only argument.

Owns the shapes. Who fills the tensors: engine/runner.py (serving, over fixed buffers) or `Batch.packed` (training, scoring: no cache).
Letters: T tokens, B batch rows (sequences), R device rows, P page-table width, N pages, H heads, S page size, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class StateView:
    """Where one kind of KV state (full, or one sliding window) lives during a forward pass."""

    slots: Tensor  # [T] int32: page * S + offset, where each new token's K and V go; padding points into page 0
    page_table: Tensor  # [R, P] int32, all device rows; entries before a sliding window may be 0
    page_size: int


@dataclass(slots=True)
class Batch:
    """One forward pass over T tokens of B sequences, packed: sequence b owns tokens query_start[b] : query_start[b + 1].

    With `caches` None there is no cache: every sequence is computed whole and attention sees only the batch (the training path)."""

    ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    query_start: Tensor  # [B + 1] int32
    lengths: Tensor  # [B] int32: tokens in the sequence's cache once this pass is done
    rows: Tensor  # [B] int32: device row of each sequence (index into page tables)
    max_query: int  # upper bounds, host ints: longest query and longest length
    max_length: int
    ops: Any  # kernels.Ops, which comes later in the import order
    kinds: tuple[StateView, ...] = ()
    caches: list[tuple[Tensor, Tensor]] | None = None  # per layer K and V, each [N, H, S, D]
    wanted: Tensor | None = None  # [B] int32: each sequence's one token whose hidden state will be read; None: every token's
    alone: Tensor | None = None  # [B + 1] int32, query_start of the wanted tokens by themselves; None: attention is to see them among the others

    @staticmethod
    def packed(sequences: list[list[int]], ops: Any, device: torch.device | str = "cpu") -> Batch:
        """A batch without cache over whole sequences (training, scoring)."""
        sizes = torch.tensor([len(s) for s in sequences], dtype=torch.int32)
        start = torch.zeros(len(sequences) + 1, dtype=torch.int32)
        start[1:] = sizes.cumsum(0)
        longest = int(sizes.max())
        return Batch(
            ids=torch.tensor([t for s in sequences for t in s], dtype=torch.int32, device=device),
            positions=torch.cat([torch.arange(len(s), dtype=torch.int32) for s in sequences]).to(device),
            query_start=start.to(device),
            lengths=sizes.to(device),
            rows=torch.arange(len(sequences), dtype=torch.int32, device=device),
            max_query=longest,
            max_length=longest,
            ops=ops,
        )
