"""The CPU overlay: reference.py's operations in C++ (kernels.cpp), called through ctypes, and linear layers over bf16 weights.

Owns the way from tensors to pointers. What an operation means stands in reference.py; it also computes whatever the C++ does not take
(other dtypes, strided inputs). ctypes lets go of the GIL during a call. Threads are torch's (`torch.set_num_threads`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniinfer.kernels import reference
from miniinfer.kernels.cpu.build import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SIGNATURES: dict[str, list[type]] = {
    "linear": [c_void_p] * 4 + [c_long] * 3 + [c_int],
    "rms_norm": [c_int] + [c_void_p] * 5 + [c_long] * 2 + [c_float],
    "silu_mul": [c_int] + [c_void_p] * 2 + [c_long] * 2,
    "rope_qkv_cache": [c_int] + [c_void_p] * 9 + [c_long] * 5 + [c_float],
    "paged_attention": [c_int] + [c_void_p] * 8 + [c_long] * 7 + [c_float, c_long, c_int],
    "moe": [c_void_p] * 5 + [c_long] * 5 + [c_int],
    "sample": [c_void_p] * 8 + [c_long] * 2,
    "step_inputs": [c_void_p] * 9 + [c_long] * 5,
    "pack": [c_void_p] * 2 + [c_long] * 2,
}


def typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' argument types set."""
    for name, types in _SIGNATURES.items():
        function = getattr(lib, "mi_" + name)
        function.argtypes, function.restype = types, None
    lib.mi_packed_size.argtypes, lib.mi_packed_size.restype = [c_long] * 2, c_long
    return lib


@cache
def _library() -> ctypes.CDLL:
    return typed(library())


def load() -> None:
    """Compiles (at first use) and loads the kernels; RuntimeError with the mend if that is not possible here."""
    _library()


def _taken(*tensors: Tensor | None) -> bool:
    """Whether the C++ takes these: contiguous, all of one dtype that it knows."""
    first = tensors[0]
    return (
        first is not None
        and first.dtype in _DTYPES
        and all(t is None or (t.dtype == first.dtype and t.is_contiguous()) for t in tensors)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ linear


def pack_linear(weight: Tensor, bias: Tensor | None, fixed_order: bool = False) -> Callable[[Tensor], Tensor]:
    """x [..., K] -> x W^T + b [..., N] for weight [N, K]: a packed copy and our kernels for bf16, the weight itself and F.linear otherwise.

    `fixed_order`: a token's sums are taken in the same order whatever the number of tokens."""
    if not _taken(weight, bias) or weight.dtype != torch.bfloat16:
        if fixed_order:
            return lambda x: reference.linear_each(x, weight, bias)
        return lambda x: F.linear(x, weight, bias)
    lib, (n, k) = _library(), weight.shape
    packed = torch.empty(lib.mi_packed_size(n, k), dtype=torch.bfloat16)
    lib.mi_pack(weight.data_ptr(), packed.data_ptr(), n, k)
    function, pointer, bias_pointer = lib.mi_linear, packed.data_ptr(), None if bias is None else bias.data_ptr()
    keep = packed, bias  # the pointers' owners live as long as `apply`

    def apply(x: Tensor) -> Tensor:
        if x.dtype != keep[0].dtype:
            raise TypeError(f"packed for {keep[0].dtype}, called with {x.dtype}")
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], n))
        function(pointer, bias_pointer, x.data_ptr(), out.data_ptr(), x.numel() // k, n, k, fixed_order)
        return out

    return apply


# ------------------------------------------------------------------------------------------------- norms, activations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _taken(x, weight):
        return reference.rms_norm(x, weight, eps)
    out, n = torch.empty_like(x), x.shape[-1]
    _library().mi_rms_norm(_DTYPES[x.dtype], x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, x.numel() // n, n, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _taken(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    out, total, n = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    _library().mi_rms_norm(
        _DTYPES[x.dtype], x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(), x.numel() // n, n, eps
    )
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    if not _taken(gate_up):
        return reference.silu_mul(gate_up)
    n = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], n))
    _library().mi_silu_mul(_DTYPES[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), out.numel() // max(n, 1), n)
    return out


# --------------------------------------------------------------------------------------------------------- attention


def rope_qkv_cache(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos_sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    if not _taken(qkv, q_weight, k_weight, k_cache, v_cache):
        return reference.rope_qkv_cache(
            qkv, num_heads, num_kv_heads, cos_sin, positions, q_weight, k_weight, eps, k_cache, v_cache, slots
        )  # fmt: skip
    tokens, dim = qkv.shape[0], cos_sin.shape[-1]
    q = qkv.new_empty(tokens, num_heads, dim)
    normed = q_weight is not None and k_weight is not None
    _library().mi_rope_qkv_cache(
        _DTYPES[qkv.dtype], qkv.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(),
        q_weight.data_ptr() if normed and q_weight is not None else None, k_weight.data_ptr() if normed and k_weight is not None else None,
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(),
        tokens, num_heads, num_kv_heads, dim, k_cache.shape[2], eps,
    )  # fmt: skip
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_query: int, max_length: int, fixed_order: bool = False,
) -> Tensor:  # fmt: skip
    if not _taken(q, k_cache, v_cache) or q.shape[2] > 512:
        return reference.paged_attention(
            q, k_cache, v_cache, page_table, rows, query_start, lengths, scale, window, max_query, max_length
        )  # fmt: skip
    out = torch.empty_like(q)
    tokens, heads, dim = q.shape
    _library().mi_paged_attention(
        _DTYPES[q.dtype], q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), page_table.data_ptr(), rows.data_ptr(),
        query_start.data_ptr(), lengths.data_ptr(), tokens, rows.shape[0], page_table.shape[1], heads, k_cache.shape[1], k_cache.shape[2], dim,
        scale, window, fixed_order,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------- mixture of experts


def moe(x: Tensor, router_logits: Tensor, w13: Tensor, w2: Tensor, top_k: int, renormalize: bool, fixed_order: bool = False) -> Tensor:
    if not _taken(x, w13, w2) or x.dtype != torch.bfloat16:
        if fixed_order:
            each = (reference.moe(x[t : t + 1], router_logits[t : t + 1], w13, w2, top_k, renormalize) for t in range(len(x)))
            return torch.cat([x[:0], *each])
        return reference.moe(x, router_logits, w13, w2, top_k, renormalize)
    out, logits = torch.empty_like(x), router_logits.float().contiguous()
    tokens, experts, inner = x.shape[0], w2.shape[0], w2.shape[2]
    _library().mi_moe(
        x.data_ptr(), logits.data_ptr(), w13.data_ptr(), w2.data_ptr(), out.data_ptr(),
        tokens, x.shape[1], inner, experts, top_k, renormalize,
    )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------- sampling, inputs


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor, filtered: bool
) -> Tensor:
    logits, temperature, seeds, positions = (t.contiguous() for t in (logits, temperature, seeds, positions))
    top_k, top_p, min_p = (t.contiguous() for t in (top_k, top_p, min_p))
    out = torch.empty(logits.shape[0], dtype=torch.int32)
    limits = [t.data_ptr() if filtered else None for t in (top_k, top_p, min_p)]
    _library().mi_sample(
        logits.data_ptr(), temperature.data_ptr(), *limits, seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), *logits.shape
    )  # fmt: skip
    return out


sample_rows = partial(reference.sample_rows, draw=sample)


def apply_bitmask(logits: Tensor, masks: Tensor, which: Tensor) -> Tensor:
    forbidden = torch.from_numpy(np.unpackbits((~masks).numpy().view(np.uint8), axis=1, bitorder="little")).view(torch.bool)[:, : logits.shape[1]]
    out = logits.clone()
    for entry, mask in enumerate(which.tolist()):
        if mask >= 0:
            out[entry].masked_fill_(forbidden[mask], float("-inf"))
    return out


def step_inputs(
    tokens: Tensor, rows: Tensor, starts: Tensor, query_start: Tensor, num_tokens: int,
    page_tables: list[Tensor], page_size: int, ids: Tensor, positions: Tensor, lengths: Tensor, slots: list[Tensor],
) -> None:  # fmt: skip
    shared = tokens.data_ptr(), rows.data_ptr(), starts.data_ptr(), query_start.data_ptr()
    first = ids.data_ptr(), positions.data_ptr(), lengths.data_ptr()
    sizes = rows.shape[0], num_tokens, tokens.shape[1]
    for table, out in zip(page_tables, slots, strict=True):
        _library().mi_step_inputs(*shared, table.data_ptr(), *first, out.data_ptr(), *sizes, table.shape[1], page_size)
        first = None, None, None  # type: ignore[assignment]  # the same for every kind


# ------------------------------------------------------------------------------------------------------ deterministic


def fixed_order() -> dict[str, Any]:
    """The operations whose sums could otherwise depend on the other tokens of a step, in the form where they do not (`--deterministic`).

    C++'s experts (`dots`) sum in one order for any number of rows; only their fallback does not."""
    return {f.__name__: partial(f, fixed_order=True) for f in (pack_linear, paged_attention, moe)}
