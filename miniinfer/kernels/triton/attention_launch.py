"""Attention over the paged cache and over packed sequences: which kernel takes which sequence, and with what tiles.

A sequence with one new token is decoded (decode.py: its keys split over programs), one with more is computed in query tiles (prefill.py),
whatever else is in the batch; Hopper has kernels of its own for most shapes (hopper_launch.py). All walk keys in blocks at absolute positions,
and tile sizes depend on the model only, so a token's result depends neither on the batch nor on where chunks of its prompt were cut.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from miniinfer.kernels.triton import pdl
from miniinfer.kernels.triton.decode import combine_kernel, decode_kernel
from miniinfer.kernels.triton.prefill import prefill_kernel
from miniinfer.kernels.triton.rope import rope_qkv_cache

try:
    from miniinfer.kernels.triton import hopper_launch
except ImportError:  # Gluon is experimental and may move: decode.py and prefill.py do without it
    hopper_launch = None  # type: ignore[assignment]

LOG2E = 1.4426950408889634
CHUNK = 256  # keys of one split of a decoded sequence; longer ones double it until the chunks fit
CHUNKS_TIMES_HEADS = 256  # a sequence's chunks over all kv heads: enough to fill a GPU with one sequence
DECODE_PROGRAMS = 4096  # programs of a decode launch at most, unless there are more (sequence, head) pairs


def attention(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, scale: float, window: int, max_query: int) -> Tensor:
    """As the reference; forward only (raises RuntimeError if a gradient is wanted)."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("the Triton attention has no backward pass: take the reference ops for training")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        _prefill(q, k, v, out, None, None, query_start, None, scale, window, k.shape[1], False)
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_query: int, max_length: int,
) -> Tensor:  # fmt: skip
    """As the reference. Tokens beyond query_start[B] and sequences of length <= 0 get zeros.

    On Hopper, decoding begins to read before the two kernels ahead of it are complete: the last of them may write the queries and each
    sequence's last key and value (rope_qkv_cache does), but the rest of the cache, tables and lengths must be the work of kernels before."""
    dim = q.shape[2]
    assert k_cache.stride()[2:] == (dim, 1) and v_cache.stride()[2:] == (dim, 1) and page_table.stride(1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not len(q):
        return out
    single = max_query == 1 or len(q) == 1
    mixed = not single and len(rows) > 1
    hopper = hopper_launch is not None
    if (single or mixed) and hopper and hopper_launch.takes_decode(q, k_cache, v_cache):
        hopper_launch.decode(q, k_cache, v_cache, out, page_table, rows, query_start, lengths, scale, window, max_length)
    elif single or mixed:
        _decode(q, k_cache, v_cache, out, page_table, rows, query_start, lengths, scale, window, max_length)
    if not single and hopper and not window and hopper_launch.takes(q, k_cache, v_cache):
        hopper_launch.prefill(q, k_cache, v_cache, out, page_table, rows, query_start, lengths, scale, mixed)
    elif not single:
        _prefill(q, k_cache, v_cache, out, page_table, rows, query_start, lengths, scale, window, k_cache.shape[1], mixed)
    return out


def rope_paged_attention(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos_sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_query: int, max_length: int,
) -> Tensor:  # fmt: skip
    """rope_qkv_cache, then paged_attention, to the bit. Where every sequence has one new token, on Hopper, it is one kernel, which takes a token's
    position from its sequence's length.

    That kernel begins to read before the one ahead of it (of qkv's product) is complete: the cache, tables and lengths must be the work of
    kernels before."""
    dim = cos_sin.shape[-1]
    q = qkv.view(len(qkv), -1, dim)[:, :num_heads]
    if max_query == 1 and len(qkv) and hopper_launch is not None and hopper_launch.takes_decode(q, k_cache, v_cache):
        assert cos_sin.is_contiguous() and page_table.stride(1) == 1
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rope = hopper_launch.Rope(cos_sin, q_weight, k_weight, eps, slots)
        hopper_launch.decode(q, k_cache, v_cache, out, page_table, rows, query_start, lengths, scale, window, max_length, rope)
        return out
    q = rope_qkv_cache(qkv, num_heads, num_kv_heads, cos_sin, positions, q_weight, k_weight, eps, k_cache, v_cache, slots)
    return paged_attention(q, k_cache, v_cache, page_table, rows, query_start, lengths, scale, window, max_query, max_length)


def prefill_tiles(group: int, dim: int, element_size: int) -> dict[str, int]:
    """Tile sizes and launch options of prefill_kernel, from the model's shape alone. fp32 products run without tensor cores: small tiles."""
    wide = dim > 128
    if element_size == 4:
        block_m, block_n, warps, stages = 32, 16, 8 if wide else 4, 2
    else:
        block_m, block_n, warps, stages = 128, 32 if wide else 64, 8, 3
    return {"BLOCK_M": max(block_m, triton.next_power_of_2(group)), "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def decode_tiles(group: int, dim: int, element_size: int) -> dict[str, int]:
    """Tile sizes and launch options of decode_kernel. 16 rows are the least that a tensor-core product takes."""
    wide = dim > 128
    block_n, stages = (16 if wide else 32, 2) if element_size == 4 else (32 if wide else 64, 3)
    return {"BLOCK_M": max(16, triton.next_power_of_2(group)), "BLOCK_N": block_n, "num_warps": 4, "num_stages": stages}


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, page_table: Tensor | None, rows: Tensor | None, query_start: Tensor, lengths: Tensor | None,
    scale: float, window: int, kv_heads: int, skip_single: bool,
) -> None:  # fmt: skip
    tokens, heads, dim = q.shape
    assert q.stride()[1:] == (dim, 1) and k.stride(-1) == 1 and v.stride(-1) == 1
    group, sequences = heads // kv_heads, len(query_start) - 1
    page_size = k.shape[2] if page_table is not None else 0
    tiles = prefill_tiles(group, dim, q.element_size())
    tile_queries = tiles["BLOCK_M"] // group
    grid = (tokens // tile_queries + sequences, kv_heads)
    prefill_kernel[grid](
        q, k, v, out, page_table, rows, query_start, lengths, sequences, tokens, scale * LOG2E,
        q.stride(0), page_table.stride(0) if page_table is not None else 0, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        GROUP=group, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), PAGE_SIZE=page_size, WINDOW=window, SKIP_SINGLE=skip_single, **tiles,
    )  # fmt: skip


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_length: int,
) -> None:  # fmt: skip
    tokens, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    assert q.stride()[1:] == (dim, 1)
    group, sequences, block_d = heads // kv_heads, len(rows), triton.next_power_of_2(dim)
    limit = max(4, CHUNKS_TIMES_HEADS // kv_heads)
    slots = min(limit, triton.cdiv(min(max_length, window or max_length), CHUNK) + 1)  # + 1: a window may begin inside a chunk
    splits = max(1, min(slots, DECODE_PROGRAMS // (sequences * kv_heads)))
    partial = torch.empty(sequences, heads, slots, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(sequences, heads, slots, 2, dtype=torch.float32, device=q.device)
    decode_kernel[(kv_heads, sequences, splits)](
        q, k_cache, v_cache, out, partial, stats, page_table, rows, query_start, lengths, sequences, tokens, splits, slots, scale * LOG2E,
        q.stride(0), page_table.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        GROUP=group, DIM=dim, BLOCK_D=block_d, PAGE_SIZE=page_size, WINDOW=window, CHUNK=CHUNK, LIMIT=limit,
        **decode_tiles(group, dim, q.element_size()), **pdl.launch_options(tokens),
    )  # fmt: skip
    if max_length > CHUNK:
        combine_kernel[(heads, sequences)](
            out, partial, stats, query_start, lengths, slots,
            DIM=dim, BLOCK_D=block_d, BLOCK_C=16, WINDOW=window, CHUNK=CHUNK, LIMIT=limit, num_warps=2, **pdl.launch_options(tokens),
        )  # fmt: skip
