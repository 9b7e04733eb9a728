"""top_k, top_p and min_p without a sort: three launches around the draw in sampling.py.

All three keep a prefix of the row sorted by (logit, lower id first), so they come down to how many entries, and how much mass, stand before an
entry. `summarize` finds a row's maximum, its softmax's sum, and a distance below the maximum beyond which no filter's cut can lie. `histogram`
counts entries and mass in bins over that distance, which tells in which bins the cuts are. The draw takes the best of the bins above, and lists
the entries of those bins; `finish` finds the listed entries' exact ranks by comparing each with each, and the best of all that stay. If more than
LIST entries share the bins (equal logits, mostly), it bisects the row instead. Masses are integers, so the order of programs changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton.gumbel import (
    LARGEST,
    best_part,
    last_arrival,
    nothing,
    order,
    pack,
    packed_index,
    packed_value,
    row_key,
    score,
    token_of,
    unorder,
)  # fmt: skip
from miniinfer.kernels.triton.pdl import begin

SUMMARY_BLOCK = 2048  # entries of a program that summarizes; fixed, because it decides the order of a sum
FILTER_BLOCK, FILTER_WARPS = 1024, 4  # of a program of the histogram
GROUP = tl.constexpr(128)  # entries whose maximum is kept
BINS = tl.constexpr(2048)
DEPTH = tl.constexpr(32.0)  # nats; further down an entry neither wins (noise spans 20) nor adds to a sum in fp32
LIST = tl.constexpr(1024)
ONE = tl.constexpr(1 << 43)  # a weight is an int64: a count above, below it the mass in units of the row's sum / 2^42
UNITS = tl.constexpr(float(1 << 42))
# A row's int32 record between the launches. The entry where the filters cut is in bins FIRST to LAST, that of top_k alone in K_BIN;
# BINS: no cut. FIRST is UNKNOWN before the histogram, ALL for a row without filters. LISTED counts what the draw lists.
FIRST, LAST, K_BIN, LISTED, RECORD = (tl.constexpr(i) for i in range(5))
UNKNOWN, ALL = tl.constexpr(-1), tl.constexpr(1 << 20)
# A row's fp32 scales: its maximum, the sum of exp((logit - maximum) / temperature), bins per unit of logit.
TOP, SUM, STEP, SCALES = (tl.constexpr(i) for i in range(4))


class Cuts(NamedTuple):
    """What the launches hand to one another, for S rows of `groups` groups each."""

    records: Tensor  # [S, RECORD] int32
    scales: Tensor  # [S, SCALES] fp32
    group_tops: Tensor  # [S, groups] fp32
    heads: Tensor  # [S, 2] int64: the weight of the bins before FIRST and before K_BIN
    listed: Tensor  # [S, LIST] int64, packed


@triton.jit
def cleaned(value):
    """fp32 with neither NaN nor infinities: what is no number counts as the lowest."""
    return tl.minimum(tl.maximum(value, -LARGEST), LARGEST)


@triton.jit
def _load(row, ids, vocab):
    return cleaned(tl.load(row + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32))


@triton.jit
def bin_of(value, top, step):
    """BINS for what is too far down."""
    return tl.minimum((top - value) * step, 1.0 * BINS).to(tl.int32)


@triton.jit
def relative(value, top, heat):
    """An entry's probability over the likeliest's."""
    return tl.exp((value - top) * (1.0 / heat))


@triton.jit
def _weight(value, top, heat, total):
    return (relative(value, top, heat) * (1.0 / total * UNITS)).to(tl.int64) + ONE


@triton.jit
def _count(weight):
    return (weight >> 43).to(tl.int32)


@triton.jit
def _mass(weight):
    return weight & (ONE - 1)


@triton.jit
def _share(mass, part):
    """`part` of a mass: what must stand before an entry that top_p drops; more than there is without top_p."""
    return tl.where(part < 1, (mass.to(tl.float32) * part).to(tl.int64), ONE)


@triton.jit
def tile_top(group_tops, part, BLOCK: tl.constexpr):
    """The maximum of a block, from its groups'."""
    return tl.max(tl.load(group_tops + part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)), 0)


@triton.jit
def _summary_kernel(
    logits, rows, temperature, top_k, top_p, min_p, group_tops, sums, bins, records, scales, arrivals, vocab, logits_stride, settings_stride,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): maxima and softmax sum of block i of row s. A row's last program sets its scales and record, and clears its bins."""
    begin(PDL)
    part, parts, entry = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    setting = tl.load(rows + entry).to(tl.int64) * settings_stride
    heat = tl.load(temperature + setting)
    keep_k, keep_p, floor = tl.load(top_k + setting), tl.load(top_p + setting), tl.load(min_p + setting)
    by_k = (keep_k > 0) & (keep_k < vocab)
    record = records + entry * RECORD
    if (heat > 0) & (by_k | (keep_p < 1) | (floor > 0)):
        group_tops += entry.to(tl.int64) * GROUPS
        sums += entry * parts * 2
        value = _load(logits + entry.to(tl.int64) * logits_stride, part * BLOCK + tl.arange(0, BLOCK), vocab)
        groups = tl.max(tl.reshape(value, [BLOCK // GROUP, GROUP]), 1)
        tl.store(group_tops + part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), groups)
        top = tl.maximum(tl.max(groups, 0), -3e38)  # above what `cleaned` makes of -inf, so that a row of nothing else keeps nothing
        tl.store(sums + part * 2, top)
        tl.store(sums + part * 2 + 1, tl.sum(relative(value, top, heat), 0))
        if last_arrival(arrivals + entry, parts):
            each = tl.arange(0, PARTS)
            tops = tl.load(sums + each * 2, mask=each < parts, other=-LARGEST, cache_modifier=".cg")
            masses = tl.load(sums + each * 2 + 1, mask=each < parts, other=0.0, cache_modifier=".cg")
            top = tl.max(tops, 0)
            total = tl.sum(masses * relative(tops, top, heat), 0)
            depth = tl.full([], DEPTH, tl.float32)
            if by_k:
                # The k-th largest of the groups' maxima is no larger than that of all entries; found from above, to 1/128 nat.
                at = tl.arange(0, GROUPS)
                every = tl.load(group_tops + at, mask=at < parts * (BLOCK // GROUP), other=-LARGEST, cache_modifier=".cg")
                below = (top - every) * (1.0 / heat)
                lo = depth * -1e-6
                for _ in range(12):
                    middle = 0.5 * (lo + depth)
                    enough = tl.sum((below <= middle).to(tl.int32), 0) >= keep_k
                    lo, depth = tl.where(enough, lo, middle), tl.where(enough, middle, depth)
            elif keep_p < 1:
                depth = tl.log(2.0 * vocab / ((1.0 - keep_p) * total))  # all entries below hold at most half the mass that top_p drops
            else:
                depth = -tl.log(floor)
            depth = tl.minimum(depth, DEPTH) * 1.001 + 1e-6
            tl.store(scales + entry * SCALES + TOP, top)
            tl.store(scales + entry * SCALES + SUM, total)
            tl.store(scales + entry * SCALES + STEP, tl.minimum(1.0 / (depth * heat) * BINS, 1e30))
            tl.store(record + FIRST, tl.where(by_k | (keep_p < 1), UNKNOWN, BINS))
            tl.store(record + LAST, BINS)
            tl.store(record + K_BIN, BINS)
            tl.store(record + LISTED, 0)
            tl.store(bins + entry * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))
    elif part == 0:
        tl.store(record + FIRST, ALL)
        tl.store(record + LISTED, 0)


@triton.jit
def _before(weights, at, end):
    """Sum of the bins before `end`."""
    return tl.sum(tl.where(at < end, weights, 0), 0)


@triton.jit
def _histogram_kernel(
    logits, rows, temperature, top_k, top_p, group_tops, bins, records, scales, heads, arrivals, vocab, logits_stride, settings_stride,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): adds block i of row s to its bins. A row's last program finds those in which the filters cut."""
    begin(PDL)
    part, parts, entry = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    record = records + entry * RECORD
    if tl.load(record + FIRST) == UNKNOWN:
        setting = tl.load(rows + entry).to(tl.int64) * settings_stride
        bins += entry * BINS
        scale = scales + entry * SCALES
        top, total, step = tl.load(scale + TOP), tl.load(scale + SUM), tl.load(scale + STEP)
        if bin_of(tile_top(group_tops + entry.to(tl.int64) * GROUPS, part, BLOCK), top, step) < BINS:
            value = _load(logits + entry.to(tl.int64) * logits_stride, part * BLOCK + tl.arange(0, BLOCK), vocab)
            place = bin_of(value, top, step)
            tl.atomic_add(bins + place, _weight(value, top, tl.load(temperature + setting), total), mask=place < BINS, sem="relaxed")
        if last_arrival(arrivals + entry, parts):
            keep_k, keep_p = tl.load(top_k + setting), tl.load(top_p + setting)
            at = tl.arange(0, BINS)
            weights = tl.load(bins + at, cache_modifier=".cg")
            through = tl.cumsum(weights, 0)
            k_bin = BINS + 0
            least = tl.full([], UNITS, tl.float32).to(tl.int64)  # mass that top_k leaves: all, or between these two
            most = least
            if (keep_k > 0) & (keep_k < vocab):
                k_bin = tl.sum((_count(through) < keep_k).to(tl.int32), 0)
                if k_bin < BINS:
                    least, most = _mass(_before(weights, at, k_bin)), _mass(_before(weights, at, k_bin + 1))
            first = tl.minimum(k_bin, tl.sum((_mass(through) < _share(least, keep_p)).to(tl.int32), 0))
            tl.store(record + FIRST, first)
            tl.store(record + LAST, tl.minimum(k_bin, tl.sum((_mass(through) < _share(most, keep_p)).to(tl.int32), 0)))
            tl.store(record + K_BIN, k_bin)
            tl.store(heads + entry * 2, _before(weights, at, first))
            tl.store(heads + entry * 2 + 1, _before(weights, at, k_bin))


@triton.jit
def _best_listed(listed, number, record, heads, top, total, step, heat, key, keep_k, keep_p, floor, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """The best of the list's entries that all filters leave. Before an entry stand the bins above, and entries listed with it."""
    slot = tl.arange(0, SIZE)
    used = slot < number
    mine = tl.where(used, tl.load(listed + slot, mask=used, other=0), nothing())
    value = packed_value(mine)
    place = bin_of(cleaned(value), top, step)
    last, k_bin = tl.load(record + LAST), tl.load(record + K_BIN)
    inside = place <= last  # else in the bin of top_k, further down
    head, k_head = tl.load(heads), tl.load(heads + 1)
    before = tl.where(inside, head, k_head)
    for start in range(0, number, CHUNK):
        at = start + tl.arange(0, CHUNK)
        other = tl.where(at < number, tl.load(listed + at, mask=at < number, other=0), nothing())
        entry = cleaned(packed_value(other))
        above = (other[None, :] > mine[:, None]) & ((bin_of(entry, top, step) <= last)[None, :] == inside[:, None])
        before += tl.sum(tl.where(above, _weight(entry, top, heat, total)[None, :], 0), 1)
    by_k = (keep_k <= 0) | (_count(before) < keep_k)
    left = tl.full([], UNITS, tl.float32).to(tl.int64)
    if k_bin < BINS:
        left = _mass(k_head) + tl.sum(tl.where(used & (place == k_bin) & by_k, _mass(_weight(cleaned(value), top, heat, total)), 0), 0)
    by_p = (_mass(before) < _share(left, keep_p)) | (_count(before) == 0)
    stays = used & inside & by_k & by_p & (relative(value, top, heat) >= floor)
    return tl.max(tl.where(stays, pack(score(value, packed_index(mine), heat, key), packed_index(mine)), nothing()), 0)


@triton.jit
def _weights_above(row, heat, top, total, vocab, pivot_a, pivot_b, pivot_c, BLOCK: tl.constexpr):
    """The weight of a row's entries whose order is above each pivot."""
    sum_a = tl.zeros([BLOCK], tl.int64)
    sum_b = tl.zeros([BLOCK], tl.int64)
    sum_c = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = _load(row, ids, vocab)
        weight = tl.where(ids < vocab, _weight(value, top, heat, total), 0)
        sum_a += tl.where(order(value) > pivot_a, weight, 0)
        sum_b += tl.where(order(value) > pivot_b, weight, 0)
        sum_c += tl.where(order(value) > pivot_c, weight, 0)
    return tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)


@triton.jit
def _threshold(row, heat, top, total, step, vocab, first, last, limit, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least order above which there is less than `limit` (a count or a mass), and the weight above it. It lies in bins `first` to `last`.
    Two bits a pass."""
    hi = order(tl.minimum(top - (first - 1) / step, top))
    lo = order(cleaned(top - (last + 2) / step))
    above, _, _ = _weights_above(row, heat, top, total, vocab, hi, hi, hi, BLOCK)
    while hi - lo > 1:
        quarter = (hi - lo) // 4 + tl.where((hi - lo) % 4 != 0, 1, 0).to(tl.uint32)
        a = lo + quarter
        b = a + tl.minimum(quarter, hi - a)
        c = b + tl.minimum(quarter, hi - b)
        above_a, above_b, above_c = _weights_above(row, heat, top, total, vocab, a, b, c, BLOCK)
        if (_mass(above_a) if BY_MASS else _count(above_a)) < limit:
            hi, above = a, above_a
        elif (_mass(above_b) if BY_MASS else _count(above_b)) < limit:
            lo, hi, above = a, b, above_b
        elif (_mass(above_c) if BY_MASS else _count(above_c)) < limit:
            lo, hi, above = b, c, above_c
        else:
            lo = c
    return hi, above


@triton.jit
def _best_bisected(row, record, top, total, step, heat, key, keep_k, keep_p, floor, vocab, BLOCK: tl.constexpr):
    """The best of a row's survivors, in many passes over the row by one program."""
    first, last, k_bin = tl.load(record + FIRST), tl.load(record + LAST), tl.load(record + K_BIN)
    threshold = tl.full([], 0, tl.uint32)  # below the order of every float
    ties = vocab + 0  # entries equal to the threshold that may stay, lowest index first
    left = tl.full([], UNITS, tl.float32).to(tl.int64)
    if k_bin < BINS:
        threshold, above = _threshold(row, heat, top, total, step, vocab, k_bin, k_bin, keep_k, False, BLOCK)
        ties = keep_k - _count(above)
        left = _mass(above) + ties * _mass(_weight(unorder(threshold), top, heat, total))
    if keep_p < 1:
        limit = _share(left, keep_p)
        found, above = _threshold(row, heat, top, total, step, vocab, first, last, limit, True, BLOCK)
        each = tl.maximum(_mass(_weight(unorder(found), top, heat, total)), 1)
        needed = tl.minimum((limit - _mass(above) + each - 1) // each, vocab).to(tl.int32)  # ties that the mass still lacks
        ties = tl.where(found <= threshold, tl.minimum(ties, needed), needed)
        ties = tl.where(_count(above) == 0, tl.maximum(ties, 1), ties)
        threshold = tl.maximum(found, threshold)
    best = nothing()
    seen = 0
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = _load(row, ids, vocab)
        tied = ((order(value) == threshold) & (ids < vocab)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0) - tied
        seen += tl.sum(tied, 0)
        stays = (order(value) > threshold) | ((tied > 0) & (rank < ties))
        stays = stays & (relative(value, top, heat) >= floor) & (ids < vocab)
        best = tl.maximum(best, tl.max(tl.where(stays, pack(score(value, ids, heat, key), ids), nothing()), 0))
    return best


@triton.jit
def _finish_kernel(
    logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, records, scales, heads, listed, best, out, vocab, parts,
    logits_stride, tokens_stride, settings_stride, seeds_stride, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program s: the best of row s's blocks and of what stays of its list."""
    begin(PDL)
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    position = tl.load(positions + entry)
    record, scale = records + entry * RECORD, scales + entry * SCALES
    number = tl.load(record + LISTED)
    winner = best_part(best + entry * parts, parts, PARTS)
    if number > 0:
        setting = row * settings_stride
        key = row_key(tl.load(seeds + row * seeds_stride), position)
        heat = tl.load(temperature + setting)
        keep_k, keep_p, floor = tl.load(top_k + setting), tl.load(top_p + setting), tl.load(min_p + setting)
        top, total, step = tl.load(scale + TOP), tl.load(scale + SUM), tl.load(scale + STEP)
        if number <= LIST:
            found = _best_listed(
                listed + entry * LIST, number, record, heads + entry * 2, top, total, step, heat, key, keep_k, keep_p, floor, LIST, 4
            )
            winner = tl.maximum(winner, found)
        else:
            line = logits + entry.to(tl.int64) * logits_stride
            winner = _best_bisected(line, record, top, total, step, heat, key, keep_k, keep_p, floor, vocab, BLOCK)
    token = token_of(winner)
    if tl.load(record + FIRST) != ALL:
        token = tl.where(tl.load(scale + TOP) < 1e38, token, -1)  # `cleaned` has made this of infinity
    tl.store(out + entry, token)
    tl.store(tokens + row * tokens_stride + position, packed_index(winner))


def find_cuts(
    logits: Tensor, rows: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, arrivals: Tensor, pdl: dict[str, Any]
) -> Cuts:
    """The first two launches: all of Cuts but what the draw lists."""
    entries, vocab = logits.shape
    device, strides = logits.device, (logits.stride(0), temperature.stride(0))
    parts = triton.cdiv(vocab, SUMMARY_BLOCK)
    groups = triton.next_power_of_2(parts * SUMMARY_BLOCK // GROUP.value)
    cuts = Cuts(
        torch.empty(entries, RECORD.value, dtype=torch.int32, device=device),
        torch.empty(entries, SCALES.value, dtype=torch.float32, device=device),
        torch.empty(entries, groups, dtype=torch.float32, device=device),
        torch.empty(entries, 2, dtype=torch.int64, device=device),
        torch.empty(entries, LIST.value, dtype=torch.int64, device=device),
    )
    sums = torch.empty(entries, parts, 2, dtype=torch.float32, device=device)
    bins = torch.empty(entries, BINS.value, dtype=torch.int64, device=device)
    _summary_kernel[(parts, entries)](
        logits, rows, temperature, top_k, top_p, min_p, cuts.group_tops, sums, bins, cuts.records, cuts.scales, arrivals, vocab, *strides,
        BLOCK=SUMMARY_BLOCK, PARTS=triton.next_power_of_2(parts), GROUPS=groups, num_warps=4, **pdl,
    )  # fmt: skip
    _histogram_kernel[(triton.cdiv(vocab, FILTER_BLOCK), entries)](
        logits, rows, temperature, top_k, top_p, cuts.group_tops, bins, cuts.records, cuts.scales, cuts.heads, arrivals, vocab, *strides,
        BLOCK=FILTER_BLOCK, GROUPS=groups, num_warps=FILTER_WARPS, **pdl,
    )  # fmt: skip
    return cuts


def finish(
    logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, cuts: Cuts, best: Tensor, out: Tensor, pdl: dict[str, Any],
) -> None:  # fmt: skip
    """The last launch: `best` [S, parts] from the draw and the lists to `out` [S] and the rows' tokens."""
    parts = best.shape[1]
    strides = logits.stride(0), tokens.stride(0), temperature.stride(0), seeds.stride(0)
    _finish_kernel[(len(logits),)](
        logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, cuts.records, cuts.scales, cuts.heads, cuts.listed, best, out,
        logits.shape[1], parts, *strides, BLOCK=4096, PARTS=triton.next_power_of_2(parts), num_warps=8, **pdl,
    )  # fmt: skip
