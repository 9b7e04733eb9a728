"""Sampling and penalties on the device.

Without filters a row is split over programs and each entry is read once: temperature, Gumbel noise and arg max in one pass. With filters
one program a row first finds the smallest logit that survives, by bisection over the order of floats as integers, which needs no
sort; ties at that threshold are kept by index, as a stable sort keeps them. Random bits equal the reference's.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton.pdl import begin, launch_options

SAMPLE_BLOCK = 4096  # entries a program of the one-pass kernel reads
FILTER_BLOCK = 8192  # entries that a row's program of the filter kernel holds at once


@triton.jit
def _mix(x):
    """murmur3's 32-bit finalizer."""
    x = (x ^ (x >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _row_key(seed, position):
    """The row's 32-bit key, as kernels/reference.py `uniform` defines it."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(_mix(low) ^ high) ^ position.to(tl.uint32))


@triton.jit
def _gumbel(key, ids):
    bits = _mix(_mix((ids.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)) ^ key) + key)
    # (bits >> 9) + 0.5 over 2^23: the bits as the mantissa of a number from 1 to 2, and an exact difference.
    u = ((bits >> 9) | tl.full([], 0x3F800000, tl.uint32)).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    return -tl.log(-tl.log(u))


@triton.jit
def _score(value, ids, heat, key):
    """What the draw maximizes: value / heat plus noise; the value itself where heat is 0."""
    if heat > 0:
        value = tl.div_rn(value, heat) + _gumbel(key, ids)
    return value


@triton.jit
def _order(x):
    """fp32 to uint32 such that integers compare as the floats do; -0 equals 0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full([], 0x80000000, tl.uint32)
    return bits ^ tl.where(bits >= sign, tl.full([], 0xFFFFFFFF, tl.uint32), sign)


@triton.jit
def _pack(value, index):
    """A uint64 that is the larger for the larger value, of equal ones for the lower index."""
    return (_order(value).to(tl.uint64) << 32) | (-1 - index).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _packed_id(packed):
    return -1 - (packed & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _last_arrival(arrivals, parts):
    """Whether the calling program is the last of `parts` to get here. It then sees what all of them stored before, and the counter is 0 again."""
    tl.debug_barrier()  # the stores of all of this program's threads
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _draw_kernel(
    logits, rows, positions, tokens, temperature, seeds, best, arrivals, out, vocab,
    logits_stride, tokens_stride, temperature_stride, seeds_stride, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): the best of block i of entry s; the last program of an entry takes the best of its blocks."""
    begin(PDL)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    entry = tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + entry.to(tl.int64) * logits_stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    row = tl.load(rows + entry).to(tl.int64)
    position = tl.load(positions + entry)
    key = _row_key(tl.load(seeds + row * seeds_stride), position)
    score = _score(value, ids, tl.load(temperature + row * temperature_stride), key)
    score = tl.where((ids < vocab) & (score == score), score, -float("inf"))
    top, at = tl.max(score, 0, return_indices=True)  # ties to the lower index
    tl.store(best + entry * parts + part, _pack(top, part * BLOCK + at).to(tl.int64, bitcast=True))
    if _last_arrival(arrivals + entry, parts):
        each = tl.arange(0, PARTS)
        found = tl.load(best + entry * parts + each, mask=each < parts, other=0, cache_modifier=".cg").to(tl.uint64, bitcast=True)
        token = _packed_id(tl.max(found, 0))
        tl.store(out + entry, token)
        tl.store(tokens + row * tokens_stride + position, token)


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
def _filter_sample_kernel(
    logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, out, vocab,
    logits_stride, tokens_stride, settings_stride, seeds_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b: row b's threshold, then the best survivor. All three filters keep a prefix of the sorted row, so one threshold says it all."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_stride
    device_row = tl.load(rows + index).to(tl.int64)
    position = tl.load(positions + index)
    setting = device_row * settings_stride
    heat = tl.load(temperature + setting)
    greedy = heat <= 0
    heat = tl.where(greedy, 1.0, heat)
    keep_k = tl.where(greedy, 0, tl.load(top_k + setting))
    keep_p = tl.where(greedy, 1.0, tl.load(top_p + setting))
    floor = tl.where(greedy, 0.0, tl.load(min_p + setting))

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

    key = _row_key(tl.load(seeds + device_row * seeds_stride), position)
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
    tl.store(tokens + device_row * tokens_stride + position, best_id)


@cache
def _arrival_counters(device: torch.device, entries: int) -> Tensor:
    """Zeros that every launch leaves zero. Kept for good: graphs hold their address."""
    return torch.zeros(entries, dtype=torch.int32, device=device)


def sample_rows(
    logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, filtered: bool,
) -> Tensor:  # fmt: skip
    """As the reference. Where a cumulative mass meets top_p to the last bits of fp32, sums in another order may keep one token more or less.
    A number of entries must have been run once before it is captured into a graph."""
    entries, vocab = logits.shape
    settings_stride = temperature.stride(0)
    assert logits.stride(1) == 1 and tokens.stride(1) == 1 and all(t.stride(0) == settings_stride for t in (top_k, top_p, min_p))
    out = torch.empty(entries, dtype=torch.int32, device=logits.device)
    if not entries:
        return out
    strides = logits.stride(0), tokens.stride(0), settings_stride, seeds.stride(0)
    if filtered:
        block = min(FILTER_BLOCK, triton.next_power_of_2(vocab))
        _filter_sample_kernel[(entries,)](
            logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, out, vocab, *strides,
            BLOCK=block, num_warps=min(32, max(4, block // 256)),
        )  # fmt: skip
        return out
    block = SAMPLE_BLOCK if entries > 8 else 1024
    parts = triton.cdiv(vocab, block)
    best = torch.empty(entries, parts, dtype=torch.int64, device=logits.device)
    arrivals = _arrival_counters(logits.device, triton.next_power_of_2(max(entries, 1024)))
    _draw_kernel[(parts, entries)](
        logits, rows, positions, tokens, temperature, seeds, best, arrivals, out, vocab, *strides,
        BLOCK=block, PARTS=triton.next_power_of_2(parts), num_warps=block // 512, **launch_options(entries),
    )  # fmt: skip
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
