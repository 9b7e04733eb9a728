"""Sampling and penalties on the device.

Without filters a row is split over programs and each entry is read once: temperature, Gumbel noise and arg max in one pass. With filters
one program a row first finds the smallest logit that survives, by bisection over the order of floats as integers, which needs no
sort; ties at that threshold are kept by index, as a stable sort keeps them. Random bits equal the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SAMPLE_BLOCK = 4096  # entries a program of the one-pass kernel reads
FILTER_BLOCK = 8192  # entries that a row's program of the filter kernel holds at once


@triton.jit
def _mix(x):
    """murmur3's 32-bit finalizer."""
    x = (x ^ (x >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _row_key(seeds, positions, row):
    """The row's 32-bit key, as kernels/reference.py `uniform` defines it."""
    seed = tl.load(seeds + row)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(_mix(low) ^ high) ^ tl.load(positions + row).to(tl.uint32))


@triton.jit
def _gumbel(key, ids):
    bits = _mix(_mix((ids.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)) ^ key) + key)
    u = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(u))


@triton.jit
def _sample_kernel(logits, temperature, seeds, positions, best_value, best_id, vocab, logits_stride, BLOCK: tl.constexpr):
    """Program (b, i): the best of block i of row b."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row.to(tl.int64) * logits_stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        score = tl.where(ids < vocab, tl.div_rn(score, heat) + _gumbel(_row_key(seeds, positions, row), ids), -float("inf"))
    value, at = tl.max(score, 0, return_indices=True)  # ties to the lower index
    place = row * tl.num_programs(1) + part
    tl.store(best_value + place, value)
    tl.store(best_id + place, part * BLOCK + at)


@triton.jit
def _pick_kernel(best_value, best_id, out, parts, vocab, BLOCK: tl.constexpr):
    """Program b: the best of a row's parts."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    value = tl.load(best_value + row * parts + offs, mask=offs < parts, other=-float("inf"))
    at = tl.argmax(value, 0)
    tl.store(out + row, tl.minimum(tl.load(best_id + row * parts + tl.minimum(at, parts - 1)), vocab - 1))


@triton.jit
def _order(x):
    """fp32 to uint32 such that integers compare as the floats do; -0 equals 0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full([], 0x80000000, tl.uint32)
    return bits ^ tl.where(bits >= sign, tl.full([], 0xFFFFFFFF, tl.uint32), sign)


@triton.jit
def _unorder(order):
    """The float of an order."""
    sign = tl.full([], 0x80000000, tl.uint32)
    return (order ^ tl.where(order >= sign, sign, tl.full([], 0xFFFFFFFF, tl.uint32))).to(tl.float32, bitcast=True)


@triton.jit
def _sums_above(row, heat, top, vocab, pivot_a, pivot_b, pivot_c, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Over the entries of a row whose order is above each pivot: their number, or with WEIGHTED their mass exp(entry - top)."""
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(row + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32), heat)
        order = tl.where(ids < vocab, _order(value), 0)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.exp(value - top)
        sum_a += tl.where(order > pivot_a, weight, 0.0)
        sum_b += tl.where(order > pivot_b, weight, 0.0)
        sum_c += tl.where(order > pivot_c, weight, 0.0)
    return tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)


@triton.jit
def _threshold(row, heat, top, vocab, lo, hi, limit, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The least order in (lo, hi] above which lies less than `limit`, and what lies above it. Two bits a pass; nothing lies above hi."""
    above = 0.0
    while hi - lo > 1:
        quarter = (hi - lo) // 4 + tl.where((hi - lo) % 4 != 0, 1, 0).to(tl.uint32)
        a = lo + quarter
        b = a + tl.minimum(quarter, hi - a)
        c = b + tl.minimum(quarter, hi - b)
        above_a, above_b, above_c = _sums_above(row, heat, top, vocab, a, b, c, WEIGHTED, BLOCK)
        if above_a < limit:
            hi, above = a, above_a
        elif above_b < limit:
            lo, hi, above = a, b, above_b
        elif above_c < limit:
            lo, hi, above = b, c, above_c
        else:
            lo = c
    return hi, above


@triton.jit
def _filter_sample_kernel(logits, temperature, top_k, top_p, min_p, seeds, positions, out, vocab, logits_stride, BLOCK: tl.constexpr):
    """Program b: row b's threshold, then the best survivor. All three filters keep a prefix of the sorted row, so one threshold says it all."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_stride
    heat = tl.load(temperature + index)
    greedy = heat <= 0
    heat = tl.where(greedy, 1.0, heat)
    keep_k = tl.where(greedy, 0, tl.load(top_k + index))
    keep_p = tl.where(greedy, 1.0, tl.load(top_p + index))
    floor = tl.where(greedy, 0.0, tl.load(min_p + index))

    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = tl.load(row + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
        tops = tl.maximum(tops, tl.div_rn(value, heat))
    top = tl.max(tops, 0)
    highest = _order(top)

    threshold = tl.full([], 0, tl.uint32)  # below the order of every float
    ties = vocab  # entries equal to the threshold that may stay, lowest index first
    if (keep_k > 0) & (keep_k < vocab):
        threshold, above = _threshold(row, heat, top, vocab, threshold, highest, keep_k.to(tl.float32), False, BLOCK)
        ties = keep_k - above.to(tl.int32)
    if keep_p < 1.0:
        mass, _, _ = _sums_above(row, heat, top, vocab, threshold, threshold, threshold, True, BLOCK)
        if threshold > 0:
            mass += ties * tl.exp(_unorder(threshold) - top)
        lowest = threshold - tl.where(threshold > 0, 1, 0).to(tl.uint32)
        found, before = _threshold(row, heat, top, vocab, lowest, highest, keep_p * mass, True, BLOCK)
        each = tl.exp(_unorder(found) - top)
        needed = tl.minimum(tl.ceil((keep_p * mass - before) / each), 1.0 * vocab).to(tl.int32)  # ties that the mass still lacks
        needed = tl.maximum(needed, 1)
        ties = tl.where(found == threshold, tl.minimum(ties, needed), needed)
        threshold = found

    key = _row_key(seeds, positions, index)
    best = float("-inf")
    best_id = 0
    seen = 0
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = tl.div_rn(tl.load(row + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32), heat)
        order = tl.where(ids < vocab, _order(value), 0)
        tied = ((order == threshold) & (ids < vocab)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0) - tied
        seen += tl.sum(tied, 0)
        keep = (order > threshold) | ((tied > 0) & (rank < ties))
        keep = keep & ((tl.exp(value - top) >= floor) | (value == top))
        score = tl.where(greedy, value, value + _gumbel(key, ids))
        part, at = tl.max(tl.where(keep, score, float("-inf")), 0, return_indices=True)
        best_id = tl.where(part > best, start + at, best_id)
        best = tl.maximum(part, best)
    tl.store(out + index, best_id)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor, filtered: bool
) -> Tensor:
    """As the reference. Where a cumulative mass meets top_p to the last bits of fp32, sums in another order may keep one token more or less."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return out
    options = [t.contiguous() for t in (temperature, top_k, top_p, min_p, seeds, positions)]  # columns of the device rows
    temperature, top_k, top_p, min_p, seeds, positions = options
    if filtered:
        block = min(FILTER_BLOCK, triton.next_power_of_2(vocab))
        _filter_sample_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, seeds, positions, out, vocab, logits.stride(0),
            BLOCK=block, num_warps=min(32, max(4, block // 256)),
        )  # fmt: skip
        return out
    parts = triton.cdiv(vocab, SAMPLE_BLOCK)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _sample_kernel[(rows, parts)](logits, temperature, seeds, positions, values, ids, vocab, logits.stride(0), BLOCK=SAMPLE_BLOCK, num_warps=8)
    _pick_kernel[(rows,)](values, ids, out, parts, vocab, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return out


PROMPT_FLAG = tl.constexpr(1 << 30)  # in a count: the token stands in the prompt


@triton.jit
def _count_kernel(tokens, rows, prompt_lens, lengths, counts, tokens_stride, vocab, BLOCK: tl.constexpr):
    """Program (b, i): enters a block of row b's tokens into counts [B, V]: output tokens are counted, prompt tokens flagged."""
    index = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = at < tl.load(lengths + index)
    token = tl.load(tokens + tl.load(rows + index).to(tl.int64) * tokens_stride + at, mask=present, other=-1)
    present = present & (token >= 0) & (token < vocab)
    output = at >= tl.load(prompt_lens + index)
    place = counts + index.to(tl.int64) * vocab + token
    tl.atomic_add(place, 1, mask=present & output, sem="relaxed")
    tl.atomic_or(place, PROMPT_FLAG, mask=present & ~output, sem="relaxed")


@triton.jit
def _penalty_kernel(logits, counts, repetition, presence, frequency, out, vocab, logits_stride, BLOCK: tl.constexpr):
    """Program (b, i): block i of row b, penalized."""
    index = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab
    value = tl.load(logits + index.to(tl.int64) * logits_stride + ids, mask=mask, other=0.0).to(tl.float32)
    place = index.to(tl.int64) * vocab + ids
    entry = tl.load(counts + place, mask=mask, other=0)
    factor = tl.where(entry > 0, tl.load(repetition + index), 1.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    count = (entry & (PROMPT_FLAG - 1)).to(tl.float32)
    value = value - count * tl.load(frequency + index)
    tl.store(out + place, value - tl.where(count > 0, tl.load(presence + index), 0.0), mask=mask)


def apply_penalties(
    logits: Tensor, tokens: Tensor, rows: Tensor, prompt_lens: Tensor, lengths: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, max_length: int,
) -> Tensor:  # fmt: skip
    """As the reference."""
    batch, vocab = logits.shape
    out = torch.empty(batch, vocab, dtype=torch.float32, device=logits.device)
    if not batch:
        return out
    assert logits.stride(1) == 1 and tokens.stride(1) == 1
    counts = torch.zeros(batch, vocab, dtype=torch.int32, device=logits.device)
    columns = [t.contiguous() for t in (rows, prompt_lens, lengths, repetition, presence, frequency)]
    rows, prompt_lens, lengths, repetition, presence, frequency = columns
    longest = max(1, min(max_length, tokens.shape[1]))
    _count_kernel[(batch, triton.cdiv(longest, 1024))](tokens, rows, prompt_lens, lengths, counts, tokens.stride(0), vocab, BLOCK=1024, num_warps=4)
    _penalty_kernel[(batch, triton.cdiv(vocab, 4096))](
        logits, counts, repetition, presence, frequency, out, vocab, logits.stride(0), BLOCK=4096, num_warps=8
    )
    return out
