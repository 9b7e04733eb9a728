"""Attention for sequences with several new tokens: FlashAttention's online softmax [Dao et al. 2022] over query tiles.

Owns the kernel; attention_launch.py owns the launch. A tile holds BLOCK_M // GROUP queries with all GROUP heads that share a kv head, so a
block of keys is read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_pages(table, base, start, hi, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the block of keys at `start` lies: its page, or the page of each key if blocks do not divide pages; `base` without pages.

    Loops call it one block ahead, so that the keys' own loads wait for no other load and can be pipelined."""
    if PAGE_SIZE == 0:
        page = base.to(tl.int64)
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE_SIZE, mask=start < hi, other=0).to(tl.int64)
    else:
        at = start + tl.arange(0, BLOCK_N)
        page = tl.load(table + at // PAGE_SIZE, mask=at < hi, other=0).to(tl.int64)
    return page


@triton.jit
def load_keys_values(
    k, v, page, start, lo, hi, k_stride, v_stride, offs_d,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_N, BLOCK_D] of positions start .. start + BLOCK_N, zero outside [lo, hi) if MASKED.

    k and v point at the head; page is from find_pages. Values outside must be zeros, not whatever lies there: a probability of 0 does
    not silence a NaN."""
    at = start + tl.arange(0, BLOCK_N)
    inside = (at >= lo) & (at < hi)
    if PAGE_SIZE == 0:
        k_at = k + (page + at)[:, None] * k_stride + offs_d[None, :]
        v_at = v + (page + at)[:, None] * v_stride + offs_d[None, :]
    elif PAGE_SIZE % BLOCK_N == 0:
        tile = (start % PAGE_SIZE + tl.arange(0, BLOCK_N))[:, None] * DIM + offs_d[None, :]
        k_at = k + page * k_stride + tile
        v_at = v + page * v_stride + tile
    else:
        tile = (at % PAGE_SIZE)[:, None] * DIM + offs_d[None, :]
        k_at = k + page[:, None] * k_stride + tile
        v_at = v + page[:, None] * v_stride + tile
    if MASKED:
        mask = inside[:, None] & (offs_d < DIM)[None, :]
        keys = tl.load(k_at, mask=mask, other=0.0)
        values = tl.load(v_at, mask=mask, other=0.0)
    elif offs_d.shape[0] > DIM:
        keys = tl.load(k_at, mask=(offs_d < DIM)[None, :], other=0.0)
        values = tl.load(v_at, mask=(offs_d < DIM)[None, :], other=0.0)
    else:
        keys = tl.load(k_at)
        values = tl.load(v_at)
    return keys, values


@triton.jit
def online_softmax(acc, top, total, scores, values, qk_scale):
    """Folds a block of scores [M, N] (-inf where hidden) and its values [N, D] into (weighted sum, running maximum, running total)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet stays at zero
    probs = tl.exp2(scores * qk_scale - safe[:, None])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(probs, 1)
    acc = tl.dot(probs.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def clear_padding(out, query_start, num_seqs, num_tokens, head, heads, worker, workers, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Zeroes this kv head's part of the output rows that belong to no sequence; shared out over `workers` programs."""
    offs = tl.arange(0, 128)
    row_size = heads.to(tl.int64) * (GROUP * DIM)
    for token in range(tl.load(query_start + num_seqs) + worker, num_tokens, workers):
        start = out + token * row_size + head * (GROUP * DIM)
        for at in range(0, GROUP * DIM, 128):
            tl.store(start + at + offs, tl.zeros([128], out.dtype.element_ty), mask=at + offs < GROUP * DIM)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_stride"])
def prefill_kernel(
    q, k, v, out, page_table, rows, query_start, lengths, num_seqs, num_tokens, qk_scale,
    q_stride, table_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SKIP_SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, head): tile i, counted from the end since the last tiles of a causal sequence are the longest.

    The flattened tile map costs no memory and no kernel: sequence b's tiles begin at query_start[b] // TILE + b, which leaves room for
    all of them; the few programs in the gaps find nothing to do. PAGE_SIZE 0: keys and values lie packed beside the queries."""
    TILE: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(1)
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    clear_padding(out, query_start, num_seqs, num_tokens, head, tl.num_programs(1), index, tl.num_programs(0), GROUP, DIM)

    seq, end = 0, num_seqs
    while end - seq > 1:  # the last sequence that begins at or before this tile
        middle = (seq + end) // 2
        before = tl.load(query_start + middle) // TILE + middle <= index
        seq = tl.where(before, middle, seq)
        end = tl.where(before, end, middle)
    begin = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - begin
    first = (index - begin // TILE - seq) * TILE  # first query of the tile within its sequence
    if first >= count:
        return
    if SKIP_SINGLE and count == 1:
        return

    table = page_table
    length = count
    if PAGE_SIZE > 0:
        length = tl.load(lengths + seq)
        table = page_table + tl.load(rows + seq).to(tl.int64) * table_stride
    context = length - count  # tokens before the first query
    k += head.to(tl.int64) * k_head_stride
    v += head.to(tl.int64) * v_head_stride

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    query = first + offs_m // GROUP
    valid = (offs_m < TILE * GROUP) & (query < count)
    mask = valid[:, None] & (offs_d < DIM)[None, :]
    row = (begin + query).to(tl.int64)[:, None]
    column = (head * GROUP + offs_m % GROUP)[:, None] * DIM + offs_d[None, :]
    queries = tl.load(q + row * q_stride + column, mask=mask, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    lo = 0
    hi = tl.minimum(length, context + first + TILE)  # past the last key that any query of the tile sees
    if WINDOW > 0:
        lo = tl.maximum(0, context + first - WINDOW + 1)
        masked_from = lo // BLOCK_N * BLOCK_N
    else:
        masked_from = tl.maximum(0, context + first + 1) // BLOCK_N * BLOCK_N  # blocks before it are seen whole by every query
        page = find_pages(table, begin, 0, hi, PAGE_SIZE, BLOCK_N)
        for start in range(0, masked_from, BLOCK_N):
            keys, values = load_keys_values(k, v, page, start, 0, hi, k_stride, v_stride, offs_d, DIM, PAGE_SIZE, BLOCK_N, False)
            page = find_pages(table, begin, start + BLOCK_N, hi, PAGE_SIZE, BLOCK_N)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            acc, top, total = online_softmax(acc, top, total, scores, values, qk_scale)
    page = find_pages(table, begin, masked_from, hi, PAGE_SIZE, BLOCK_N)
    for start in range(masked_from, hi, BLOCK_N):
        keys, values = load_keys_values(k, v, page, start, lo, hi, k_stride, v_stride, offs_d, DIM, PAGE_SIZE, BLOCK_N, True)
        page = find_pages(table, begin, start + BLOCK_N, hi, PAGE_SIZE, BLOCK_N)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        ahead = (start + tl.arange(0, BLOCK_N))[None, :] - (context + query)[:, None]
        seen = ahead <= 0
        if WINDOW > 0:
            seen = seen & (ahead > -WINDOW)
        acc, top, total = online_softmax(acc, top, total, tl.where(seen, scores, float("-inf")), values, qk_scale)

    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row * (tl.num_programs(1) * GROUP * DIM) + column, result.to(out.dtype.element_ty), mask=mask)
