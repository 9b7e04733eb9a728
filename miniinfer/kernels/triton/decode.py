"""Attention for sequences with one new token: keys split into chunks over programs, partial results combined by a second kernel.

Owns the two kernels; attention_launch.py owns the launch. Chunk size and order are functions of the sequence's own length, so the result does
not depend on the batch; how many programs share the chunks does depend on it, and changes nothing but time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from miniinfer.kernels.triton import pdl
from miniinfer.kernels.triton.prefill import clear_padding, find_pages, load_keys_values, online_softmax


@triton.jit
def _chunks(length, WINDOW: tl.constexpr, CHUNK: tl.constexpr, LIMIT: tl.constexpr):
    """(first visible key, chunk size, first chunk, number of chunks <= LIMIT) of a sequence; chunks lie at multiples of their size."""
    lo = 0
    if WINDOW > 0:
        lo = tl.maximum(0, length - WINDOW)
    size = CHUNK
    while size * (LIMIT - 1) < length - lo:
        size *= 2
    first = lo // size
    return lo, size, first, (length + size - 1) // size - first


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "splits", "slots", "table_stride"])
def decode_kernel(
    q, k, v, out, partial, stats, page_table, rows, query_start, lengths, num_seqs, num_tokens, splits, slots, qk_scale,
    q_stride, table_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, b, s): chunks s, s + splits, ... of sequence b for one kv head and the GROUP query heads that share it.

    Writes, for each chunk, the unnormalized sum to partial [B, Hq, slots, D] and (maximum, total) to stats [B, Hq, slots, 2]; the
    final result if there is but one chunk. Sequences whose number of queries is not 1 are left alone."""
    pdl.begin(PDL)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(0)
    if split == 0:
        clear_padding(out, query_start, num_seqs, num_tokens, head, heads, seq, num_seqs, GROUP, DIM)
    begin = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) - begin != 1:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < GROUP)[:, None] & (offs_d < DIM)[None, :]
    q_head = head * GROUP + offs_m
    column = q_head[:, None] * DIM + offs_d[None, :]
    target = out + begin.to(tl.int64) * (heads * GROUP * DIM) + column
    length = tl.load(lengths + seq)
    if length <= 0:
        tl.store(target, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask=mask)
        return
    lo, size, first, count = _chunks(length, WINDOW, CHUNK, LIMIT)
    if split >= count:
        return

    queries = tl.load(q + begin.to(tl.int64) * q_stride + column, mask=mask, other=0.0)
    table = page_table + tl.load(rows + seq).to(tl.int64) * table_stride
    k += head.to(tl.int64) * k_head_stride
    v += head.to(tl.int64) * v_head_stride
    for chunk in range(split, count, splits):
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        chunk_start = (first + chunk) * size
        chunk_end = tl.minimum(chunk_start + size, length)
        block_start = tl.maximum(chunk_start, lo // BLOCK_N * BLOCK_N)
        page = find_pages(table, 0, block_start, length, PAGE_SIZE, BLOCK_N)
        for start in range(block_start, chunk_end, BLOCK_N):
            keys, values = load_keys_values(k, v, page, start, lo, length, k_stride, v_stride, offs_d, DIM, PAGE_SIZE, BLOCK_N, True)
            page = find_pages(table, 0, start + BLOCK_N, length, PAGE_SIZE, BLOCK_N)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            at = start + offs_n
            scores = tl.where(((at >= lo) & (at < length))[None, :], scores, float("-inf"))
            acc, top, total = online_softmax(acc, top, total, scores, values, qk_scale)
        if count == 1:
            tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            place = (seq.to(tl.int64) * (heads * GROUP) + q_head) * slots + chunk
            tl.store(partial + place[:, None] * DIM + offs_d[None, :], acc, mask=mask)
            tl.store(stats + place * 2, top, mask=offs_m < GROUP)
            tl.store(stats + place * 2 + 1, total, mask=offs_m < GROUP)


@triton.jit(do_not_specialize=["slots"])
def combine_kernel(
    out, partial, stats, query_start, lengths, slots,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (query head, b): the chunks of one head's result, rescaled to their common maximum and summed in order."""
    pdl.begin(PDL)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    begin = tl.load(query_start + seq)
    length = tl.load(lengths + seq)
    if (tl.load(query_start + seq + 1) - begin != 1) | (length <= 0):
        return
    lo, size, first, count = _chunks(length, WINDOW, CHUNK, LIMIT)
    if count == 1:
        return
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    base = (seq.to(tl.int64) * tl.num_programs(0) + head) * slots
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_C):
        chunk = start + offs_c
        tops = tl.load(stats + (base + chunk) * 2, mask=chunk < count, other=-float("inf"))
        totals = tl.load(stats + (base + chunk) * 2 + 1, mask=chunk < count, other=0.0)
        sums = tl.load(partial + (base + chunk)[:, None] * DIM + offs_d[None, :], mask=(chunk < count)[:, None] & (offs_d < DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top)
        total = total * decay + tl.sum(totals * weights, 0)
        acc = acc * decay + tl.sum(sums * weights[:, None], 0)
        top = new_top
    row = out + (begin.to(tl.int64) * tl.num_programs(0) + head) * DIM
    tl.store(row + offs_d, (acc / total).to(out.dtype.element_ty), mask=offs_d < DIM)
