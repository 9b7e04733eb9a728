"""The bookkeeping of a step on the device: what the host has staged, input buffers from device rows, tokens to the host, page copies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

STAGE_PROGRAMS = 16


@triton.jit(do_not_specialize=["host_stride"])
def _stage_kernel(host, turns, fixed, memory, host_stride, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Programs share the fixed entries and the changes by blocks. Each has a counter of its own, so that none changes under another."""
    worker = tl.program_id(0)
    turn = tl.load(turns + worker)
    source = host + (turn & 1) * host_stride
    count = tl.load(source + FIXED, cache_modifier=".cv")
    offs = worker * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    for at in range(0, FIXED, step):
        mask = at + offs < FIXED
        tl.store(fixed + at + offs, tl.load(source + at + offs, mask=mask, cache_modifier=".cv"), mask=mask)
    source += FIXED + 1
    for at in range(0, count, step):
        mask = at + offs < count
        where = tl.load(source + at + offs, mask=mask, cache_modifier=".cv")
        tl.store(memory + where, tl.load(source + count + at + offs, mask=mask, cache_modifier=".cv"), mask=mask)
    tl.debug_barrier()  # all of the program's threads know whose turn it is
    tl.store(turns + worker, turn + 1)


def stage(host: Tensor, turns: Tensor, fixed: Tensor, memory: Tensor) -> None:
    """As the reference; STAGE_PROGRAMS entries in `turns`. The kernel reads the host's memory itself: a copy would have to wait for the step before
    it and then be waited for."""
    assert len(turns) == STAGE_PROGRAMS and host.stride(1) == 1
    _stage_kernel[(STAGE_PROGRAMS,)](host, turns, fixed, memory, host.stride(0), FIXED=len(fixed), BLOCK=1024, num_warps=8)


@triton.jit(do_not_specialize=["size", "host_stride"])
def _deliver_kernel(tokens, host, turns, size, host_stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    target = host + ((tl.load(turns) - 1) & 1) * host_stride
    tl.store(target + offs, tl.load(tokens + offs, mask=mask), mask=mask)


def deliver(tokens: Tensor, host: Tensor, turns: Tensor) -> None:
    """As the reference; likewise without a copy."""
    _deliver_kernel[(triton.cdiv(len(tokens), 1024),)](tokens, host, turns, len(tokens), host.stride(0), BLOCK=1024, num_warps=8)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "tokens_stride", "table_stride"])
def _step_inputs_kernel(
    tokens, rows, starts, query_start, table, ids, positions, lengths, slots, num_seqs, num_tokens, tokens_stride, table_stride,
    PAGE_SIZE: tl.constexpr, INPUTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK tokens, each of which finds its sequence by bisection, and the lengths of BLOCK sequences."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if INPUTS:
        seq_mask = at < num_seqs
        count = tl.load(query_start + at + 1, mask=seq_mask, other=0) - tl.load(query_start + at, mask=seq_mask, other=0)
        tl.store(lengths + at, tl.load(starts + at, mask=seq_mask, other=0) + count, mask=seq_mask)

    mask = at < num_tokens
    used = mask & (at < tl.load(query_start + num_seqs))
    seq = tl.zeros([BLOCK], tl.int32)  # the last sequence that begins at or before the token; empty ones are passed over
    step = 1
    while step < num_seqs:
        step *= 2
    while step > 0:
        candidate = seq + step
        valid = candidate < num_seqs
        begins = tl.load(query_start + candidate, mask=valid, other=0)
        seq = tl.where(valid & (begins <= at), candidate, seq)
        step //= 2
    place = tl.load(starts + seq, mask=used, other=0) + at - tl.load(query_start + seq, mask=used, other=0)
    used = used & (place >= 0)  # a padding sequence may start before its row
    row = tl.load(rows + seq, mask=used, other=0).to(tl.int64)
    if INPUTS:
        tl.store(ids + at, tl.load(tokens + row * tokens_stride + place, mask=used, other=0), mask=mask)
        tl.store(positions + at, tl.where(used, place, 0), mask=mask)
    if SLOTS:
        page = tl.load(table + row * table_stride + place // PAGE_SIZE, mask=used, other=0)
        tl.store(slots + at, tl.where(used, page * PAGE_SIZE + place % PAGE_SIZE, 0), mask=mask)


def step_inputs(
    tokens: Tensor, rows: Tensor, starts: Tensor, query_start: Tensor, num_tokens: int,
    page_tables: list[Tensor], page_size: int, ids: Tensor, positions: Tensor, lengths: Tensor, slots: list[Tensor],
) -> None:  # fmt: skip
    """As the reference; one launch for the inputs and the first state kind, one more for each further kind."""
    sequences, block = len(rows), 128
    assert tokens.stride(1) == 1
    grid = (triton.cdiv(max(num_tokens, sequences, 1), block),)
    for kind in range(max(len(page_tables), 1)):
        paged = bool(page_tables)
        table, out = (page_tables[kind], slots[kind]) if paged else (rows, rows)
        _step_inputs_kernel[grid](
            tokens, rows, starts, query_start, table, ids, positions, lengths, out, sequences, num_tokens, tokens.stride(0), table.stride(0),
            PAGE_SIZE=page_size, INPUTS=kind == 0, SLOTS=paged, BLOCK=block, num_warps=4,
        )  # fmt: skip


@triton.jit
def _copy_pages_kernel(k, v, source, destination, k_stride, v_stride, size, BLOCK: tl.constexpr):
    """Program (i, j, c): block j of page copy i, of K (c = 0) or V."""
    pair = tl.program_id(0)
    base, stride = k, k_stride
    if tl.program_id(2) == 1:
        base, stride = v, v_stride
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    from_page = base + tl.load(source + pair).to(tl.int64) * stride
    to_page = base + tl.load(destination + pair).to(tl.int64) * stride
    tl.store(to_page + offs, tl.load(from_page + offs, mask=offs < size), mask=offs < size)


def copy_pages(caches: list[tuple[Tensor, Tensor]], source: Tensor, destination: Tensor) -> None:
    """As the reference; one launch a layer, none for an empty list."""
    if not len(source):
        return
    for k, v in caches:
        size = k[0].numel()
        assert k[0].is_contiguous() and v[0].is_contiguous()
        grid = (len(source), triton.cdiv(size, 4096), 2)
        _copy_pages_kernel[grid](k, v, source, destination, k.stride(0), v.stride(0), size, BLOCK=4096, num_warps=8)
