"""Checks of overlay kernels against the reference ops, shared by the GPU tests and by the interpreter's run on the CPU.

A check takes (device, dtype, full): `full` False shrinks it to what Triton's interpreter does in a second or two. Inputs are fresh random
numbers, memory that must not be read holds NaN, and results are compared with the reference in fp32 on the same inputs. As a script it
runs every check in the interpreter and prints one JSON object, check name to error message (null: passed).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miniinfer.kernels import REFERENCE as ref
from miniinfer.kernels import Ops, reference

NAN = float("nan")


def triton_ops() -> Ops:
    """The table under test."""
    from miniinfer.kernels import triton

    triton.load()
    return Ops.overlay("triton", triton)


def close(out: Tensor, want: Tensor, what: str, dtype: torch.dtype, bf16: float = 6e-3, fp32: float = 1e-5) -> None:
    """Asserts the relative error in norm, and that every number is one."""
    limit = fp32 if dtype == torch.float32 else bf16
    out, want = out.double(), want.double()
    assert out.isfinite().all(), f"{what}: {int((~out.isfinite()).sum())} of {out.numel()} results are not finite"
    error = float((out - want).norm() / want.norm().clamp_min(1e-30))
    assert error <= limit, f"{what}: relative error {error:.2e} above {limit:.0e}"


def same(out: Tensor, want: Tensor, what: str) -> None:
    """Asserts equality to the last bit."""
    assert out.shape == want.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(want.shape)}"
    different = int((out != want).sum())
    assert different == 0, f"{what}: {different} of {out.numel()} entries differ"


def poison(device: str, *shapes: tuple[int, ...]) -> None:
    """Leaves NaN where the allocator will next put tensors of these sizes, so that an entry nobody writes shows."""
    for shape in shapes:
        del [torch.full(shape, NAN, device=device)][0]


# ------------------------------------------------------------------------------------------------ norms, activations


def check_norms(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    sizes = [(1, 64), (3, 100), (7, 128)] + ([(1, 1024), (33, 4096), (512, 5120), (5, 12288), (257, 2049)] if full else [])
    for rows, size in sizes:
        x = torch.randn(rows, size, device=device, dtype=dtype) * 3
        weight, residual = torch.randn(size, device=device, dtype=dtype), torch.randn(rows, size, device=device, dtype=dtype)
        close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x.float(), weight.float(), 1e-6), f"rms_norm {rows}x{size}", dtype)
        want, total = reference.add_rms_norm(x, residual, weight, 1e-6)
        out, summed = ops.add_rms_norm(x, residual.clone(), weight, 1e-6)
        same(summed, total, f"residual {rows}x{size}")
        close(out, want, f"add_rms_norm {rows}x{size}", dtype, bf16=5e-4)  # the same roundings: all but a few entries equal
    strided = torch.randn(6, 200, device=device, dtype=dtype)[:, :128]
    weight = torch.randn(128, device=device, dtype=dtype)
    close(ops.rms_norm(strided, weight, 1e-6), reference.rms_norm(strided.float(), weight.float(), 1e-6), "rms_norm of a slice", dtype)


def check_silu_mul(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for rows, size in [(1, 32), (3, 100)] + ([(1, 3072), (129, 12288), (1000, 768), (3, 5000)] if full else []):
        x = torch.randn(rows, 2 * size, device=device, dtype=dtype) * 4
        close(ops.silu_mul(x), reference.silu_mul(x.float()), f"silu_mul {rows}x{size}", dtype)
        close(ops.silu_mul(x), reference.silu_mul(x), f"silu_mul {rows}x{size}, roundings", dtype, bf16=1e-3)


# ------------------------------------------------------------------------------------------------------------ linear


def check_linear(device: str, dtype: torch.dtype, full: bool) -> None:
    """The kernels by themselves, since packing leaves fp32 to torch; inputs by rows of a wider tensor, as the last positions are."""
    from miniinfer.kernels.triton import pdl
    from miniinfer.kernels.triton.linear import Rows, Tiles, by_rows, tiled

    for n, k in [(40, 64), (33, 200), (16, 1024)] + [(4099, 1024), (1024, 2048), (257, 4104), (6144, 256)] * full:
        weight, bias = torch.randn(n, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
        counters = torch.zeros(n // 16 + 1, dtype=torch.int32, device=device)
        for tokens in (1, 3, 17) + (2, 8, 16, 31, 32) * full:
            x, wide = torch.randn(tokens, k + 8, device=device).to(dtype)[:, :k], k >= 512
            for b in (None, bias) if full else (bias if tokens == 3 else None,):
                want = F.linear(x.double(), weight.double(), None if b is None else b.double())
                for split in (1, 2) + (4,) * wide:
                    poison(device, (tokens, n), (split, tokens, n))
                    out = tiled(x, weight, b, counters, Tiles(16, 32, 2, 2, split, 32 if device == "cuda" and pdl.available() else 0))
                    close(out, want, f"tiles {n}x{k} T={tokens} split={split}", dtype)
                    assert not counters.any(), f"tiles {n}x{k} T={tokens} split={split}: counters are left behind"
                if tokens == 1:
                    poison(device, (tokens, n))
                    close(by_rows(x, weight, b, Rows(4, 64, 2)), want, f"rows {n}x{k}", dtype)
                    if n % 2 == 0:
                        poison(device, (tokens, n // 2))
                        gated = by_rows(x, weight, b, Rows(4, 64, 2), gated=True)
                        close(gated, reference.silu_mul(want.to(dtype)), f"gated rows {n}x{k}", dtype, bf16=1e-2)


def check_pack_linear(device: str, dtype: torch.dtype, full: bool) -> None:
    """Any number of tokens; a token's result does not depend on its neighbours within a class; new values in the weight take effect."""
    from miniinfer.kernels.triton.linear import MAX_TOKENS

    ops = triton_ops()
    shapes = [(512, 256), (256, 768), (1024, 2048), (6144, 1024), (128, 2048), (5120, 2048), (1000, 11008), (100, 1104), (70_000, 512)]
    for n, k in shapes if full else [(24, 32), (8, 12)]:
        weight, bias = (torch.randn(n, k, device=device) * k**-0.5).to(dtype), torch.randn(n, device=device).to(dtype)
        x = torch.randn(MAX_TOKENS + 1, k, device=device).to(dtype)
        want = F.linear(x.double() if n < 10_000 else x, weight.double() if n < 10_000 else weight)
        plain, biased = ops.pack_linear(weight, None), ops.pack_linear(weight, bias)
        for classes in ((1,), range(2, MAX_TOKENS + 1), (MAX_TOKENS + 1,)):
            largest = plain(x[: classes[-1]])
            for tokens in classes if full and n * k < 2**25 else (classes[0], classes[-1]):
                poison(device, (tokens, n))
                out = plain(x[:tokens])
                close(out, want[:tokens], f"packed {n}x{k} T={tokens}", dtype)
                if dtype != torch.float32:
                    same(out, largest[:tokens], f"packed {n}x{k} T={tokens} among {classes[-1]}")
            close(biased(x[: classes[0]]), want[: classes[0]] + bias, f"packed {n}x{k} T={classes[0]} with bias", dtype)
        assert plain(x[:0]).shape == (0, n) and plain(x[None]).shape == (1, len(x), n)
        weight.neg_()
        close(plain(x[:1]), -want[:1], f"packed {n}x{k}, new weight", dtype)


# ------------------------------------------------------------------------------------------------------------ rotary


def check_rope(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    cases = [(5, 4, 2, 16, 16, True), (3, 6, 1, 32, 16, False), (2, 2, 2, 80, 16, True)]
    cases += [
        (1, 32, 8, 128, 64, True),
        (77, 16, 8, 64, 64, False),
        (1000, 28, 4, 128, 128, False),
        (40, 12, 12, 96, 32, True),
        (64, 8, 1, 256, 16, True),
    ] * full
    for tokens, heads, kv_heads, dim, size, norm in cases:
        what = f"T={tokens} Hq={heads} H={kv_heads} D={dim} S={size} norm={norm}"
        pages = tokens // size + 3
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype)
        angle = torch.rand(4096, dim // 2, device=device) * 6.3
        cos_sin = torch.cat([angle.cos(), angle.sin()], -1)
        positions = torch.randint(0, 4096, (tokens,), device=device, dtype=torch.int32)
        weights = [torch.randn(dim, device=device, dtype=dtype) if norm else None for _ in range(2)]
        slots = (torch.randperm((pages - 1) * size, device=device)[:tokens] + size).int()
        mine = [torch.full((pages, kv_heads, size, dim), NAN, device=device, dtype=dtype) for _ in range(2)]
        theirs = [c.clone() for c in mine]
        q = ops.rope_qkv_cache(qkv, heads, kv_heads, cos_sin, positions, *weights, 1e-6, *mine, slots)
        want = reference.rope_qkv_cache(qkv, heads, kv_heads, cos_sin, positions, *weights, 1e-6, *theirs, slots)
        close(q, want, f"q {what}", dtype, bf16=1e-3)
        for name, out, expected in zip("KV", mine, theirs, strict=True):
            same(out.isnan(), expected.isnan(), f"{name} written where it should be, {what}")
            close(out.nan_to_num(), expected.nan_to_num(), f"{name} {what}", dtype, bf16=1e-3)


def check_large_offsets(device: str, dtype: torch.dtype, full: bool) -> None:
    """Caches of more than 2^31 elements: the last pages hold what was written there."""
    if not full:
        return
    ops, heads, size, dim = triton_ops(), 8, 64, 128
    pages = 2**31 // (heads * size * dim) + 200
    k = torch.empty(pages, heads, size, dim, dtype=torch.bfloat16, device=device)
    v = torch.empty_like(k)
    length = 150
    table = torch.tensor([[pages - 1, pages - 5, pages - 2]], dtype=torch.int32, device=device)
    at = torch.arange(length, device=device)
    slots = (table[0].long()[at // size] * size + at % size).int()
    cos_sin = torch.randn(512, dim, device=device)
    qkv = torch.randn(length, 3 * heads * dim, device=device, dtype=torch.bfloat16)
    q = ops.rope_qkv_cache(qkv, heads, heads, cos_sin, at.int(), None, None, 1e-6, k, v, slots)
    want_q, want_k, want_v = reference.rope_qkv(qkv, heads, heads, cos_sin, at.int(), None, None, 1e-6)
    close(k[table[0].long()].transpose(1, 2).flatten(0, 1)[:length], want_k, "K far out", torch.bfloat16, bf16=1e-3)
    start, lengths, rows = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, length], [length], [0]))
    want = reference.attention(want_q.float(), want_k.float(), want_v.float(), start, 0.1, 0, length)
    out = ops.paged_attention(q, k, v, table, rows, start, lengths, 0.1, 0, length, length)
    close(out, want, "prefill far out", torch.bfloat16)
    start[1] = 1
    out = ops.paged_attention(q[-1:], k, v, table, rows, start, lengths, 0.1, 0, 1, length)
    close(out, want[-1:], "decode far out", torch.bfloat16)
    source, target = (torch.tensor([p], dtype=torch.int32, device=device) for p in (pages - 1, pages - 9))
    ops.copy_pages([(k, v)], source, target)
    same(k[pages - 9], k[pages - 1], "page copied far out")


# --------------------------------------------------------------------------------------------------------- attention


def paged_case(
    device: str, dtype: torch.dtype, counts: list[int], lengths: list[int],
    heads: int, kv_heads: int, dim: int, size: int, window: int, padding: int = 0,
) -> tuple[tuple, tuple]:  # fmt: skip
    """Arguments of paged_attention for sequences with `counts` new of `lengths` tokens: (with NaN where nothing may be read, with zeros there)."""
    batch, tokens = len(counts), sum(counts) + padding
    used = [-(-n // size) if n > 0 else 0 for n in lengths]
    pages = sum(used) + 4
    order = torch.randperm(pages - 1)[: sum(used)] + 1  # page 0 is nobody's
    table = torch.zeros(batch + 3, max(used) + 2, dtype=torch.int32)
    table[:, :] = pages - 1  # entries beyond a sequence: some page
    rows = torch.randperm(batch + 3)[:batch].int()
    clean = torch.zeros(2, pages, kv_heads, size, dim, dtype=dtype)
    dirty = torch.full_like(clean, NAN)
    at = 0
    for b, n in enumerate(lengths):
        if n <= 0:
            continue
        own = order[at : at + used[b]]
        at += used[b]
        first = max(0, n - counts[b] - window + 1) if window else 0
        for i, page in enumerate(own.tolist()):
            lo, hi = max(first - i * size, 0), min(n - i * size, size)
            if hi <= lo:
                table[rows[b], i] = 0
                continue
            table[rows[b], i] = page
            values = torch.randn(2, kv_heads, hi - lo, dim).to(dtype)
            clean[:, page, :, lo:hi] = values
            dirty[:, page, :, lo:hi] = values
    start = torch.zeros(batch + 1, dtype=torch.int32)
    start[1:] = torch.tensor(counts).cumsum(0)
    q = torch.randn(tokens, heads, dim).to(dtype)
    rest = [t.to(device) for t in (table, rows, start, torch.tensor(lengths, dtype=torch.int32))]
    bounds = (dim**-0.5, window, max(max(counts), 1), max(max(lengths), 1))
    dirty_args = (q.to(device), *dirty.to(device).unbind(), *rest, *bounds)
    clean_args = (q.float().to(device), *clean.float().to(device).unbind(), *rest, *bounds)
    return dirty_args, clean_args


def describe(case: tuple) -> str:
    return "counts={} lengths={} Hq={} H={} D={} S={} window={}".format(case[0][:6], case[1][:6], *case[2:])


def check_paged(device: str, dtype: torch.dtype, what: str, ops: Ops, *case: object, **options: int) -> None:
    args, clean = paged_case(device, dtype, *case, **options)  # type: ignore[arg-type]
    poison(device, tuple(args[0].shape), (args[0].numel() * 40,))
    close(ops.paged_attention(*args), ref.paged_attention(*clean), what, dtype)


def check_decode(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    ones = [1, 1, 1]
    cases = [
        (ones, [5, 300, 17], 4, 2, 16, 16, 0),
        (ones, [64, 1, 33], 3, 1, 32, 32, 0),
        (ones, [520, 40, 300], 2, 2, 16, 64, 24),
        ([1], [4700], 16, 1, 16, 64, 0),
    ]
    if full:
        cases += [([1] * 4, [1, 64, 65, 4099], 32, 8, dim, size, w) for dim in (64, 80, 96, 128, 256) for size in (16, 64) for w in (0, 1000)]
        cases += [([1] * 3, [1000, 256, 257], 28, 4, 128, size, 300) for size in (32, 128)]
        cases += [([1], [40_000], 16, 8, 128, 64, 0), ([1, 1], [30_000, 9], 64, 64, 64, 64, 0), ([1] * 2, [70_000, 2000], 8, 1, 128, 64, 0)]
        cases += [([1] * 200, torch.randint(1, 1500, (200,)).tolist(), 16, 8, 128, 64, 0), ([1], [9000], 32, 2, 128, 16, 4096)]
    for case in cases:
        check_paged(device, dtype, f"decode {describe(case)}", ops, *case)


def check_decode_chunks(device: str, dtype: torch.dtype, full: bool) -> None:
    """With few chunks allowed, chunks double in size until a sequence fits."""
    from miniinfer.kernels.triton import attention_launch

    allowed, attention_launch.CHUNKS_TIMES_HEADS = attention_launch.CHUNKS_TIMES_HEADS, 4
    try:
        for length in (768, 769, 1100) + ((5000, 40_000) if full else ()):
            check_paged(device, dtype, f"decode in 4 chunks, length={length}", triton_ops(), [1], [length], 2, 1, 32, 64, 0)
    finally:
        attention_launch.CHUNKS_TIMES_HEADS = allowed


def check_prefill(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    cases = [
        ([9, 20], [9, 20], 4, 2, 16, 16, 0),
        ([7, 1, 30], [50, 290, 70], 6, 2, 32, 32, 0),
        ([40, 3], [130, 90], 2, 2, 16, 16, 20),
        ([33], [60], 3, 1, 80, 64, 0),
    ]
    if full:
        cases += [([100, 1, 37], [100, 513, 700], 32, 8, dim, size, w) for dim in (64, 80, 96, 128, 256) for size in (16, 64) for w in (0, 200)]
        cases += [([128, 64], [1000, 64], 28, 4, 128, size, 130) for size in (32, 128)]
        cases += [([2048], [2048], 32, 8, 128, 64, 0), ([500, 1], [20_000, 9000], 16, 8, 128, 64, 0), ([1500], [6000], 32, 8, 128, 64, 4096)]
        cases += [([3, 1, 250, 1, 1, 17], [3, 2000, 900, 1, 77, 4000], 40, 8, 128, 64, 0), ([300], [300], 32, 1, 128, 64, 0)]
        cases += [([129, 2], [129, 66], g * 2, 2, dim, 64, 0) for g in (1, 2, 8, 12, 64) for dim in (64, 128)]
        cases += [([40] * 90, torch.randint(40, 600, (90,)).tolist(), 16, 4, 128, 64, 0), ([9000], [9000], 32, 8, 128, 64, 0)]
    for case in cases:
        check_paged(device, dtype, f"prefill {describe(case)}", ops, *case)


def check_attention_padding(device: str, dtype: torch.dtype, full: bool) -> None:
    """Padding of every sort gives finite results: tokens of no sequence, sequences of no token, sequences of length 0."""
    ops = triton_ops()
    for counts, lengths in (([1, 1, 0, 0], [30, 5, 0, 0]), ([1, 1, 1], [30, 0, 0]), ([20, 1, 0, 0], [30, 7, 0, 0]), ([0, 4, 0], [0, 300, 0])):
        check_paged(device, dtype, f"padding counts={counts} lengths={lengths}", ops, counts, lengths, 4, 2, 32, 16, 0, padding=5)


def check_attention_packed(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    cases = [([5, 1, 30], 4, 2, 16, 0), ([17, 20], 2, 2, 32, 8)]
    if full:
        cases += [([1000, 1, 77, 300], 32, 8, 128, 0), ([700], 14, 2, 64, 100), ([2000, 30], 16, 8, 80, 0), ([260], 8, 8, 256, 0)]
    for counts, heads, kv_heads, dim, window in cases:
        tokens = sum(counts)
        fused = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype).to(device)
        q, k, v = fused.split([heads, kv_heads, kv_heads], 1)  # k and v strided, as rope_qkv leaves v
        q = q.contiguous()
        start = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
        want = reference.attention(q.float(), k.float(), v.float(), start, dim**-0.5, window, max(counts))
        close(ops.attention(q, k, v, start, dim**-0.5, window, max(counts)), want, f"packed {counts} D={dim} window={window}", dtype)


def check_attention_invariance(device: str, dtype: torch.dtype, full: bool) -> None:
    """A token's result is the same to the last bit alone and in company, in a prompt computed whole and in chunks."""
    if not full:
        return  # numpy's products differ with the shape
    ops = triton_ops()
    for window in (0, 500):
        (q, k, v, table, rows, start, lengths, scale, _, _, longest), _ = paged_case(
            device, dtype, [1] * 64, torch.randint(1, 3000, (64,)).tolist(), 16, 4, 128, 64, window
        )
        whole = ops.paged_attention(q, k, v, table, rows, start, lengths, scale, window, 1, longest)
        for b in (0, 17, 63):
            one = ops.paged_attention(q[b : b + 1], k, v, table, rows[b : b + 1], start[:2], lengths[b : b + 1], scale, window, 1, 100_000)
            same(one, whole[b : b + 1], f"decode alone, window={window}")
        total = 3000
        (q, k, v, table, rows, start, lengths, scale, _, _, _), _ = paged_case(device, dtype, [total], [total], 16, 4, 128, 64, window)
        k, v = k.nan_to_num(), v.nan_to_num()
        whole = ops.paged_attention(q, k, v, table, rows, start, lengths, scale, window, total, total)
        for lo, hi in ((0, 300), (300, 313), (313, 1100), (1100, 3000)):
            start[1], lengths[0] = hi - lo, hi
            part = ops.paged_attention(q[lo:hi].contiguous(), k, v, table, rows, start, lengths, scale, window, hi - lo, hi)
            same(part, whole[lo:hi], f"chunk {lo}:{hi}, window={window}")


# --------------------------------------------------------------------------------------------------- mixture of experts


def check_moe(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    cases = [(1, 32, 48, 8, 2, True), (5, 40, 24, 5, 3, False), (40, 32, 16, 4, 2, True)]
    if full:
        cases += [(t, 2048, 768, 128, 8, True) for t in (1, 2, 16, 33, 300, 2048)] + [
            (64, 1024, 512, 60, 4, False),
            (4096, 512, 1792, 8, 2, True),
            (130, 136, 72, 16, 1, False),
        ]
    for tokens, hidden, inner, experts, top_k, renormalize in cases:
        x, logits = torch.randn(tokens, hidden, device=device, dtype=dtype), torch.randn(tokens, experts, device=device, dtype=dtype)
        logits += torch.arange(experts, device=device) * 1e-3 if dtype == torch.float32 else 0
        w13 = torch.randn(experts, 2 * inner, hidden, device=device, dtype=dtype) * hidden**-0.5
        w2 = torch.randn(experts, hidden, inner, device=device, dtype=dtype) * inner**-0.5
        if dtype != torch.float32:  # rounded logits tie, and then "the" top k are a matter of taste: make them distinct
            logits = torch.stack([torch.randperm(experts, device=device) for _ in range(tokens)]).to(dtype) / 16
        poison(device, (tokens * top_k * hidden,))
        args = (top_k, renormalize)
        what = f"moe T={tokens} h={hidden} I={inner} E={experts} k={top_k}"
        out = ops.moe(x, logits, w13, w2, *args)
        close(out, reference.moe(x.float(), logits.float(), w13.float(), w2.float(), *args), what, dtype, bf16=1e-2)
        same(ops.moe(x, logits, w13, w2, *args), out, f"{what} again")
        residual, norm = torch.randn_like(x), torch.rand(hidden, device=device).to(dtype) + 0.5
        want, total = ops.add_rms_norm(out, residual.clone(), norm, 1e-6)
        normed, summed = ops.moe_into_norm(x, logits, w13, w2, *args, residual, norm, 1e-6)
        assert summed is residual
        same(summed, total, f"{what} residual")
        same(normed, want, f"{what} normed")
    logits = torch.zeros(3, 8, device=device, dtype=dtype)  # every expert ties: the lowest are taken
    x, w13, w2 = (torch.randn(*s, device=device, dtype=dtype) for s in ((3, 32), (8, 32, 32), (8, 32, 16)))
    close(ops.moe(x, logits, w13, w2, 2, True), ops.moe(x, logits[:, :2], w13[:2], w2[:2], 2, True), "ties to the lower expert", dtype)


# ---------------------------------------------------------------------------------------------------------- sampling


def sampling_case(device: str, rows: int, vocab: int, filtered: bool) -> tuple[Tensor, ...]:
    """Arguments of sample, all kinds of rows mixed: greedy, cold, hot, masked, and with each filter and all of them."""
    logits = torch.randn(rows, vocab) * 4
    logits[0, : vocab // 2] = float("-inf")
    logits[rows // 2] = logits[rows // 2].round()  # ties
    temperature = torch.tensor([0.0, 1.0, 0.7, 1e-3, 2.0])[torch.arange(rows) % 5]
    top_k = torch.tensor([0, 5, 1, -1, 50, vocab, vocab + 9])[torch.arange(rows) % 7].int()
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.0, 0.95, 0.999])[torch.arange(rows) % 6]
    min_p = torch.tensor([0.0, 0.0, 0.05, 0.5])[torch.arange(rows) % 4]
    if not filtered:
        top_k, top_p, min_p = torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p)
    seeds = torch.randint(-(2**62), 2**62, (rows,))
    positions = torch.randint(0, 100_000, (rows,), dtype=torch.int32)
    return tuple(t.to(device) for t in (logits, temperature, top_k, top_p, min_p, seeds, positions))


def drawn(
    ops: Ops, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor, filtered: bool
) -> Tensor:
    """sample_rows with the settings [S] laid into device rows as columns of a wider table, in another order; checks that the rows got the tokens."""
    entries, spare, device = len(logits), 3, logits.device
    rows = torch.randperm(entries + spare, device=device)[:entries].int()
    record = torch.full((entries + spare, 6), NAN, device=device)
    seed_column = torch.zeros(entries + spare, 2, dtype=torch.int64, device=device)
    record[rows.long()] = torch.stack([temperature, top_k.int().view(torch.float32), top_p, min_p, top_p, top_p], 1)
    seed_column[rows.long(), 0] = seeds
    tokens = torch.full((entries + spare, int(positions.max()) + 1 if entries else 1), -1, dtype=torch.int32, device=device)
    columns = record[:, 0], record.view(torch.int32)[:, 1], record[:, 2], record[:, 3], seed_column[:, 0]
    out = ops.sample_rows(logits, rows, positions, tokens, *columns, filtered)
    written = tokens[rows.long(), positions.long()]
    assert ((written >= 0) & (written < logits.shape[1])).all(), "what was written is no id"
    same(torch.where(out < 0, out, written), out, "tokens written to their rows")
    assert int((tokens >= 0).sum()) == entries, "something else was written"
    return out


def check_sample(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for rows, vocab in [(9, 131), (3, 5000)] + ([(1, 151_936), (64, 151_936), (85, 32_000), (256, 4099)] if full else []):
        args = sampling_case(device, rows, vocab, False)
        logits, temperature, _, _, _, seeds, positions = args = args[0].to(dtype), *args[1:]
        chosen = drawn(ops, *args, False).long()
        same(drawn(ops, logits.float(), *args[1:], False).long(), chosen, f"{dtype} as widened {rows}x{vocab}")
        greedy = temperature <= 0
        same(chosen[greedy], logits.float().argmax(-1)[greedy], f"greedy {rows}x{vocab}")
        score = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1) - torch.log(-torch.log(reference.uniform(seeds, positions, vocab)))
        lost = (score.max(-1).values - score.gather(1, chosen.unsqueeze(1)).squeeze(1))[~greedy]
        assert (lost < 1e-3).all(), f"sample {rows}x{vocab}: not the maximum, by {float(lost.max()):.2e}"  # logarithms differ in the last bits
    flat = torch.zeros(500 if full else 16, 300, device=device)
    seeds, positions = torch.arange(len(flat), device=device) * 2**31, torch.arange(len(flat), device=device, dtype=torch.int32)
    on, off = torch.ones(len(flat), device=device), torch.zeros(len(flat), device=device)
    want = reference.uniform(seeds, positions, 300).argmax(-1).int()
    for filtered in (False, True):
        same(drawn(ops, flat, on, off.int(), on, off, seeds, positions, filtered), want, "random bits equal the reference's")


def check_filters(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for rows, vocab in [(14, 131), (2, 9000)] + ([(42, 131), (84, 32_000), (11, 151_936), (210, 1000)] if full else []):
        args = sampling_case(device, rows, vocab, True)
        logits, temperature, top_k, top_p, min_p, seeds, positions = args
        scaled = logits / torch.where(temperature <= 0, 1.0, temperature).unsqueeze(1)
        kept = reference._filter(scaled, top_k, top_p, min_p)
        for draw in range(20 if full else 1):
            chosen = drawn(ops, logits, temperature, top_k, top_p, min_p, seeds + draw, positions, True).long()
            score = kept - torch.log(-torch.log(reference.uniform(seeds + draw, positions, vocab)))
            score = torch.where((temperature <= 0).unsqueeze(1), logits, score)
            lost = score.max(-1).values - score.gather(1, chosen.unsqueeze(1)).squeeze(1)
            assert (lost < 1e-3).all(), f"filters {rows}x{vocab}: row {int(lost.argmax())} chose a dropped or lesser token ({float(lost.max()):.2e})"
    # Ties at every threshold: the survivors must be exactly the stable sort's. Hot rows draw each of them soon.
    for k, p, m, count in ((5, 1.0, 0.0, 4), (25, 1.0, 0.0, 16), (0, 0.3, 0.0, 4), (30, 0.77, 0.0, 4), (0, 1.0, 0.995, 8), (3, 0.0, 0.0, 2)):
        tied(ops, torch.randint(0, 4, (1, 64), device=device), k, p, m, count * (20 if full else 1))
    # More of them than the list of uncertain entries holds.
    many = torch.randint(0, 2, (1, 50_000 if full else 2500), device=device)
    for k, p, m in [(1500, 0.5, 0.0)] + ([(5, 1.0, 0.0), (1200, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.999, 0.0), (1700, 0.77, 0.995)] if full else []):
        tied(ops, many, k, p, m, 200 if full else 1)


def tied(ops: Ops, levels: Tensor, k: int, p: float, m: float, count: int) -> None:
    """`count` draws from one row of equal logits or a few levels, in a distribution so flat that ids decide which of them the filters leave."""
    one, seeds = torch.ones(count, device=levels.device), torch.arange(count, device=levels.device)
    args = (levels.float().repeat(count, 1), one * 100, (one * k).int(), one * p, one * m, seeds, torch.zeros_like(seeds).int(), True)
    same(drawn(ops, *args), reference.sample(*args), f"ties k={k} p={p} min_p={m}")


def check_sample_company(device: str, dtype: torch.dtype, full: bool) -> None:
    """A row's token does not depend on the batch: alone, beside others, beside rows with filters, beside rows of NaN and infinities."""
    ops = triton_ops()
    rows, vocab = (70, 50_000) if full else (7, 2500)
    for filtered in (False, True):
        logits, *settings, seeds, positions = sampling_case(device, rows, vocab, filtered)
        args = (logits.to(dtype), *settings, seeds, positions)
        together = drawn(ops, *args, filtered)
        for i in range(0, rows, 9) if full else (0, 1, rows - 1):
            same(drawn(ops, *(t[i : i + 1] for t in args), filtered), together[i : i + 1], f"row {i} alone, filtered={filtered}")
        if not filtered:
            settings[1][::2], settings[2][::3] = 7, 0.3
            same(drawn(ops, *args, True)[1::6], together[1::6], "rows without filters beside others with")
        broken = args[0].clone()
        broken[0], broken[1, ::2], broken[3] = NAN, NAN, float("-inf")
        broken[4, 11] = float("inf")
        chosen = drawn(ops, broken, *args[1:], filtered)
        assert ((chosen >= -1) & (chosen < vocab)).all(), f"ids out of range: {chosen.tolist()}"
        assert [i for i, token in enumerate(chosen.tolist()) if token < 0] == [0, 3, 4], "rows that are not finite were not found, or others were"
        assert int(chosen[1]) % 2 == 1, "NaN was drawn"
        same(chosen[5:], together[5:], "rows beside broken ones")


def check_penalties(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for rows, vocab, longest in [(3, 131, 40)] + ([(64, 32_000, 3000), (1, 151_936, 5), (17, 999, 2049)] if full else []):
        tokens = torch.randint(0, vocab, (rows + 4, longest + 30), dtype=torch.int32, device=device)
        tokens[:, : longest // 2] %= 7  # many repetitions
        order = torch.randperm(rows + 4, device=device)[:rows].int()
        lengths = torch.randint(1, longest + 1, (rows,), dtype=torch.int32, device=device)
        prompts = (lengths * torch.rand(rows, device=device)).int()
        strengths = [torch.rand(rows, device=device) + 0.5 for _ in range(3)]
        args = (torch.randn(rows, vocab, device=device) * 5, tokens, order, prompts, lengths, *strengths, longest)
        close(ops.apply_penalties(*args), ref.apply_penalties(*args), f"penalties {rows}x{vocab}", torch.float32, fp32=1e-6)


def check_bitmask(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for rows, count, vocab in [(3, 2, 131), (1, 1, 32)] + ([(64, 64, 151_936), (17, 3, 32_001)] if full else []):
        logits = torch.randn(rows, vocab, device=device, dtype=dtype)
        masks = torch.randint(-(2**31), 2**31, (count, -(-vocab // 32)), device=device).int()
        which = torch.randint(-1, count, (rows,), device=device).int()
        got = ops.apply_bitmask(logits, masks, which)
        assert torch.equal(got, ref.apply_bitmask(logits, masks, which)), f"bitmask {rows}x{vocab}"
        for entry, mask in enumerate(which.tolist()):
            for v in (0, 31, vocab // 2, vocab - 1):
                allowed = mask < 0 or (int(masks[mask, v // 32]) >> (v % 32)) & 1
                assert got[entry, v] == (logits[entry, v] if allowed else float("-inf"))


# ------------------------------------------------------------------------------------------------------- step inputs


def check_step_inputs(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    cases: list[tuple[list[int], int, int, int]] = [
        ([1], 1, 1, 16),
        ([1, 1, 1], 5, 2, 16),
        ([40, 1, 0, 7], 60, 1, 16),
        ([0, 3, 0], 3, 0, 32),
        ([2, 1, 0, 0], 6, 1, 16),
    ]
    if full:
        cases += [([1] * 256, 256, 2, 64), ([2048, 1, 1, 700], 4096, 1, 64), (torch.randint(0, 9, (513,)).tolist(), 5000, 2, 128)]
    for counts, num_tokens, kinds, size in cases:
        batch, limit = len(counts), max(counts) + 200
        tokens = torch.randint(0, 1000, (batch + 2, limit), dtype=torch.int32, device=device)
        rows = torch.randperm(batch + 2, device=device)[:batch].int()
        starts = torch.randint(0, 190, (batch,), dtype=torch.int32, device=device)
        query_start = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
        tables = [torch.randint(1, 10_000, (batch + 2, limit // size + 1), dtype=torch.int32, device=device) for _ in range(kinds)]
        results = []
        for table in (ops, ref):
            ids, positions, lengths = (torch.full((n,), -7, dtype=torch.int32, device=device) for n in (num_tokens + 3, num_tokens + 3, batch))
            slots = [torch.full((num_tokens + 3,), -7, dtype=torch.int32, device=device) for _ in range(kinds)]
            table.step_inputs(tokens, rows, starts, query_start, num_tokens, tables, size, ids, positions, lengths, slots)
            results.append([ids, positions, lengths, *slots])
        for name, mine, want in zip(("ids", "positions", "lengths", "slots 0", "slots 1"), *results, strict=False):
            same(mine, want, f"{name} of counts={counts[:5]} in {num_tokens}")


def check_stage_and_deliver(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    pin = device != "cpu"
    for fixed_size, most in ((7, 40), (1543, 3000)) + (((6200, 40_000),) if full else ()):
        host = torch.full((2, fixed_size + 1 + 2 * most), -7, dtype=torch.int32, pin_memory=pin)
        results = torch.full((2, 300), -7, dtype=torch.int32, pin_memory=pin)
        wanted_results = results.clone()
        turns = [torch.zeros(16, dtype=torch.int32, device=device) for _ in range(2)]
        fixed = [torch.full((fixed_size + 2,), -7, dtype=torch.int32, device=device) for _ in range(2)]
        memory = [torch.full((3 * most,), -7, dtype=torch.int32, device=device) for _ in range(2)]
        for step, count in enumerate((0, most, 3)):
            host[step & 1, :fixed_size] = torch.randint(0, 10_000, (fixed_size,), dtype=torch.int32)
            host[step & 1, fixed_size] = count
            host[step & 1, fixed_size + 1 :][:count] = torch.randperm(3 * most)[:count]
            host[step & 1, fixed_size + 1 + count :][:count] = torch.randint(0, 10_000, (count,))
            tokens = torch.randint(0, 1000, (5 + 140 * step,), dtype=torch.int32, device=device)
            for table, turn, part, all_rows, out in zip((ops, ref), turns, fixed, memory, (results, wanted_results), strict=True):
                table.stage(host, turn, part[:fixed_size], all_rows)
                table.deliver(tokens, out, turn)
            if pin:
                torch.cuda.synchronize()
            for name, pair in (("turns", turns), ("fixed", fixed), ("memory", memory), ("results", (results, wanted_results))):
                same(*pair, f"{name} of {fixed_size} fixed, {count} changes in step {step}")


def check_copy_pages(device: str, dtype: torch.dtype, full: bool) -> None:
    ops = triton_ops()
    for heads, size, dim in ((2, 16, 24), (3, 8, 5)) + (((8, 64, 128),) if full else ()):
        both = torch.randn(2, 2, 9, heads, size, dim, device=device).to(dtype)  # K and V of two layers, as slices of one tensor
        caches = [(layer[0], layer[1]) for layer in both]
        copies = [(k.clone(), v.clone()) for k, v in caches]
        source, target = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([3, 1, 7], [2, 8, 5]))
        ops.copy_pages(caches, source, target)
        ref.copy_pages(copies, source, target)
        for mine, want in zip(caches, copies, strict=True):
            same(mine[0], want[0], "K pages")
            same(mine[1], want[1], "V pages")
        ops.copy_pages(caches, source[:0], target[:0])


CHECKS: dict[str, Callable[[str, torch.dtype, bool], None]] = {
    name.removeprefix("check_"): value
    for name, value in list(globals().items())
    if name.startswith("check_") and name != "check_paged"
}  # fmt: skip


def main() -> None:
    """Runs all checks at interpreter size; called in a process of its own because the interpreter must be chosen before Triton is imported."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            check("cpu", torch.float32, False)
            results[name] = None
        except Exception:  # reported by the caller's test of this name
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
