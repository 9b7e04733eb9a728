"""Sampling and penalties on the device, from the device rows' own settings.

Without filters one launch reads each logit once: a row is split over programs, each takes its best of logit / temperature plus noise, and the
row's last program takes the best of those. With filters three launches more tell which entries stay (filters.py).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton.filters import (
    ALL,
    BINS,
    FIRST,
    K_BIN,
    LAST,
    LIST,
    LISTED,
    RECORD,
    SCALES,
    STEP,
    TOP,
    Cuts,
    bin_of,
    cleaned,
    find_cuts,
    finish,
    relative,
    tile_top,
)  # fmt: skip
from miniinfer.kernels.triton.gumbel import best_of, best_part, last_arrival, nothing, pack, packed_index, row_key, token_of
from miniinfer.kernels.triton.pdl import begin, launch_options

BLOCK, WARPS = 2048, 4  # entries and warps of a program of the draw; results depend on neither
FILTERED_BLOCK, FILTERED_WARPS = 1024, 4


@triton.jit
def _draw_kernel(
    logits, rows, positions, tokens, temperature, seeds, best, arrivals, out, vocab, logits_stride, tokens_stride, settings_stride, seeds_stride,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): the best of block i of entry s. An entry's last program takes the best of its blocks."""
    begin(PDL)
    part, parts, entry = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + entry.to(tl.int64) * logits_stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    row = tl.load(rows + entry).to(tl.int64)
    position = tl.load(positions + entry)
    key = row_key(tl.load(seeds + row * seeds_stride), position)
    tl.store(best + entry * parts + part, best_of(value, ids, tl.load(temperature + row * settings_stride), key, vocab))
    if last_arrival(arrivals + entry, parts):
        winner = best_part(best + entry * parts, parts, PARTS)
        tl.store(out + entry, token_of(winner))
        tl.store(tokens + row * tokens_stride + position, packed_index(winner))


@triton.jit
def _filtered_draw_kernel(
    logits, rows, positions, temperature, seeds, min_p, records, scales, group_tops, listed, best, vocab, logits_stride, settings_stride,
    seeds_stride, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): the best of those in block i of entry s that stay whatever lies in the bins where the filters cut; lists what lies there."""
    begin(PDL)
    part, parts, entry = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    setting = row * settings_stride
    record, scale = records + entry * RECORD, scales + entry * SCALES
    first = tl.load(record + FIRST)
    last, k_bin, top, step = first, first, 0.0, 0.0
    wanted = True
    if first != ALL:
        last, k_bin, top, step = tl.load(record + LAST), tl.load(record + K_BIN), tl.load(scale + TOP), tl.load(scale + STEP)
        deepest = tl.minimum(tl.maximum(last, k_bin), BINS - 1)
        wanted = bin_of(tile_top(group_tops + entry.to(tl.int64) * GROUPS, part, BLOCK), top, step) <= deepest
    winner = nothing()
    if wanted:
        ids = part * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + entry.to(tl.int64) * logits_stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
        heat = tl.load(temperature + setting)
        if first != ALL:
            value = cleaned(value)
            place = bin_of(value, top, step)
            cut = ((((place >= first) & (place <= last)) | (place == k_bin)) & (place < BINS)).to(tl.int32)
            number = tl.sum(cut, 0)
            if number > 0:
                at = tl.atomic_add(record + LISTED, number, sem="relaxed") + tl.cumsum(cut, 0) - 1
                tl.store(listed + entry * LIST + at, pack(value, ids), mask=(cut > 0) & (at < LIST))
            stays = (place < first) & (place < BINS) & (relative(value, top, heat) >= tl.load(min_p + setting))
            value = tl.where(stays, value, -float("inf"))
        if tl.max(value, 0) > -float("inf"):
            winner = best_of(value, ids, heat, row_key(tl.load(seeds + row * seeds_stride), tl.load(positions + entry)), vocab)
    tl.store(best + entry * parts + part, winner)


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
    assert logits.stride(1) == 1 and tokens.stride(1) == 1 and all(t.stride(0) == temperature.stride(0) for t in (top_k, top_p, min_p))
    out = torch.empty(entries, dtype=torch.int32, device=logits.device)
    if not entries:
        return out
    arrivals = _arrival_counters(logits.device, triton.next_power_of_2(max(entries, 1024)))
    parts = triton.cdiv(vocab, FILTERED_BLOCK if filtered else BLOCK)
    best = torch.empty(entries, parts, dtype=torch.int64, device=logits.device)
    pdl = launch_options(entries)
    if not filtered:
        _draw_kernel[(parts, entries)](
            logits, rows, positions, tokens, temperature, seeds, best, arrivals, out, vocab,
            logits.stride(0), tokens.stride(0), temperature.stride(0), seeds.stride(0),
            BLOCK=BLOCK, PARTS=triton.next_power_of_2(parts), num_warps=WARPS, **pdl,
        )  # fmt: skip
        return out
    cuts: Cuts = find_cuts(logits, rows, temperature, top_k, top_p, min_p, arrivals, pdl)
    _filtered_draw_kernel[(parts, entries)](
        logits, rows, positions, temperature, seeds, min_p, cuts.records, cuts.scales, cuts.group_tops, cuts.listed, best, vocab,
        logits.stride(0), temperature.stride(0), seeds.stride(0),
        BLOCK=FILTERED_BLOCK, GROUPS=cuts.group_tops.shape[1], num_warps=FILTERED_WARPS, **pdl,
    )  # fmt: skip
    finish(logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, cuts, best, out, pdl)
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


@triton.jit
def _bitmask_kernel(logits, masks, which, out, vocab, logits_stride, masks_stride, BLOCK: tl.constexpr):
    """Program (s, i): block i of entry s, copied with what its mask does not allow taken out."""
    index = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    value = tl.load(logits + index.to(tl.int64) * logits_stride + ids, mask=inside, other=0.0).to(tl.float32)
    mask = tl.load(which + index)
    words = tl.load(masks + mask.to(tl.int64) * masks_stride + ids // 32, mask=inside & (mask >= 0), other=-1)
    value = tl.where((words >> (ids % 32)) & 1 != 0, value, float("-inf"))
    tl.store(out + index.to(tl.int64) * vocab + ids, value, mask=inside)


def apply_bitmask(logits: Tensor, masks: Tensor, which: Tensor) -> Tensor:
    """As the reference."""
    entries, vocab = logits.shape
    assert logits.stride(1) == 1 and masks.stride(1) == 1
    out = torch.empty(entries, vocab, dtype=logits.dtype, device=logits.device)
    if entries:
        _bitmask_kernel[(entries, triton.cdiv(vocab, 4096))](
            logits, masks, which.contiguous(), out, vocab, logits.stride(0), masks.stride(0), BLOCK=4096, num_warps=8
        )  # fmt: skip
    return out
