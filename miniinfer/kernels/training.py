"""Ops for training: attention over packed sequences with autograd and without a copy to the host.

Owns what the reference computes too slowly on a GPU; everything else of the training path is the reference itself, which torch.compile fuses.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

_HAS_WINDOW = "window_size" in inspect.signature(varlen.varlen_attn).parameters  # the first versions knew only `is_causal`


def attention(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, scale: float, window: int, max_query: int) -> Tensor:
    """See reference.attention. On a GPU one FlashAttention launch [Dao 2023] in bf16 or fp16, whose cost follows each sequence's own length;
    `query_start` may end in repeated values (empty sequences), so that its size can stay the same from batch to batch."""
    groups = q.shape[1] // k.shape[1]
    if not q.is_cuda or q.dtype == torch.float32:
        return _per_sequence(q, k, v, query_start, scale, window)
    k, v = _repeat(k, groups), _repeat(v, groups)
    causal: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)} if _HAS_WINDOW else {"is_causal": True}
    if window and not _HAS_WINDOW:
        raise RuntimeError("training with a sliding window on a GPU needs torch 2.11 or later")
    q = q * (scale * q.shape[-1] ** 0.5)  # the op's own factor is 1 / sqrt(D); a plain 1.0 for almost every model
    out: Tensor = varlen.varlen_attn(q, k, v, query_start, query_start, max_query, max_query, **causal)  # type: ignore[assignment]
    return out


def _repeat(x: Tensor, groups: int) -> Tensor:
    """[T, H, D] -> [T, H * groups, D], each head in turn."""
    return x.unsqueeze(2).expand(-1, -1, groups, -1).reshape(x.shape[0], -1, x.shape[2])


def _per_sequence(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, scale: float, window: int) -> Tensor:
    """For the CPU and for fp32, in tests and small runs: neighbours of equal length go through one call."""
    bounds = query_start.tolist()
    sizes = [hi - lo for lo, hi in zip(bounds, bounds[1:], strict=False)]
    outs, b = [], 0
    while b < len(sizes):
        n, last = sizes[b], b
        while last < len(sizes) and sizes[last] == n:
            last += 1
        if n:
            span = slice(bounds[b], bounds[last])
            qs, ks, vs = (x[span].unflatten(0, (last - b, n)).transpose(1, 2) for x in (q, k, v))  # [b, heads, n, D]
            mask = None
            if window:
                ones = q.new_ones((n, n)).bool()
                mask = ones.tril() & ones.triu(1 - window)
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=not window, scale=scale, enable_gqa=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        b = last
    return torch.cat(outs)
