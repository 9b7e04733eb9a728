"""A layer's products between two attentions in one launch, on Hopper, for few tokens: o, gate and up, down, and the next layer's qkv.

A persistent program on each multiprocessor takes its part of one product after the other. Before a product they wait for each other, and have the
first of its weights on their way meanwhile, so that the memory does not rest where a launch would end and the next one begin. The norms are folded
(unscaled.py); tiles, epilogues and the order of sums are linear_hopper.py's. Programs that wait for each other must all be running: the launch
is a cooperative one, which sees to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from miniinfer.kernels.triton import linear_hopper, pdl
from miniinfer.kernels.triton.gluon_names import reinterpret, thread_barrier
from miniinfer.kernels.triton.linear_hopper import BARRIER, MATRIX, PAIRS, ROWS, WIDTH, copy_product, fence_async, multiply_product, share
from miniinfer.kernels.triton.matmul_hopper import multiprocessors

MAX_TOKENS = 16  # with more there is nothing left to gain
LEAST = 32 << 20  # numbers in a layer's weights: with few, programs wait for each other longer than launches take


@gluon.jit
def copy(
    descs, rings, counters, sizes, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    o_desc, gate_up_desc, down_desc, qkv_desc, heads_desc, mid_desc, inner_desc, next_desc = descs
    w_boxes, pair_boxes, x_boxes, ready, empty = rings
    heads, hidden, inner, qkv = sizes
    matrix = (w_boxes, x_boxes, ready, empty)
    pairs = (pair_boxes, x_boxes, ready, empty)
    number = gl.num_programs(0)
    start = gl.program_id(0) * 0
    begin, end = share(gl.cdiv(hidden, 64))
    job = (o_desc, heads_desc, begin, end, gl.cdiv(heads, BLOCK_K), 1)
    stage, phase = copy_product(job, matrix, start, start, None, 0, BLOCK_T, BLOCK_K, STAGES, 1, False, PDL)
    begin, end = share(gl.cdiv(inner * 2, 64))
    job = (gate_up_desc, mid_desc, begin, end, gl.cdiv(hidden, BLOCK_K), 1)
    stage, phase = copy_product(job, pairs, stage, phase, counters, number, BLOCK_T, BLOCK_K, STAGES, 1, True, PDL)
    begin, end = share(gl.cdiv(hidden, 64))
    job = (down_desc, inner_desc, begin, end, gl.cdiv(inner, BLOCK_K), 1)
    stage, phase = copy_product(job, matrix, stage, phase, counters + 1, number, BLOCK_T, BLOCK_K, STAGES, 1, False, PDL)
    begin, end = share(gl.cdiv(qkv, 64))
    job = (qkv_desc, next_desc, begin, end, gl.cdiv(hidden, BLOCK_K), 1)
    copy_product(job, matrix, stage, phase, counters + 2, number, BLOCK_T, BLOCK_K, STAGES, 1, False, PDL)


@gluon.jit
def arrive(counter):
    """All that this program has written is there for the others' copies."""
    fence_async()
    thread_barrier()
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def multiply(
    vectors, outs, ring, counters, sizes, tokens, eps, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    residual, mid_norm, next_norm, bias = vectors
    mid, mid_squares, gated, nexts, next_squares, out = outs
    heads, hidden, inner, qkv = sizes
    parts = gl.cdiv(hidden, 64)
    start = gl.program_id(0) * 0
    gdc_wait()  # which may still use the counters, too
    begin, end = share(gl.cdiv(hidden, 64))
    args = (None, residual, mid_norm, mid_squares, mid, begin, end, gl.cdiv(heads, BLOCK_K), 1, tokens, hidden, parts, hidden, eps)
    stage, phase = multiply_product(0, args, ring, start, start, BLOCK_T, STAGES, 1, False, PARTS)
    arrive(counters)
    begin, end = share(gl.cdiv(inner * 2, 64))
    args = (None, None, None, mid_squares, gated, begin, end, gl.cdiv(hidden, BLOCK_K), 1, tokens, inner, parts, hidden, eps)
    stage, phase = multiply_product(0, args, ring, stage, phase, BLOCK_T, STAGES, 1, True, PARTS)
    arrive(counters + 1)
    begin, end = share(gl.cdiv(hidden, 64))
    args = (None, residual, next_norm, next_squares, nexts, begin, end, gl.cdiv(inner, BLOCK_K), 1, tokens, hidden, parts, hidden, eps)
    stage, phase = multiply_product(0, args, ring, stage, phase, BLOCK_T, STAGES, 1, False, PARTS)
    arrive(counters + 2)
    begin, end = share(gl.cdiv(qkv, 64))
    args = (bias, None, None, next_squares, out, begin, end, gl.cdiv(hidden, BLOCK_K), 1, tokens, qkv, parts, hidden, eps)
    multiply_product(0, args, ring, stage, phase, BLOCK_T, STAGES, 1, False, PARTS)
    if gl.atomic_add(counters + 3, 1) == gl.num_programs(0) - 1:  # the last program leaves the counters as it found them
        for i in gl.static_range(4):
            gl.store(counters + i, 0)


@gluon.jit(do_not_specialize=["tokens", "eps"])
def chain_hopper_kernel(
    o_desc, gate_up_desc, down_desc, qkv_desc, heads_desc, mid_desc, inner_desc, next_desc, residual, mid_norm, next_norm, bias,
    mid, mid_squares, gated, nexts, next_squares, out, counters, tokens, heads, hidden, inner, qkv, eps,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Descriptors of weights as linear_hopper_kernel's, and of tokens [T, .] in boxes [BLOCK_T, WIDTH]: heads' values, and three of what is written
    here: `mid` and `nexts` [T, hidden], values of an Unscaled whose squares [T, PARTS at most] are beside them, and `gated` [T, inner]. residual
    [T, hidden] is added to in place; out [T, qkv]. counters: 4 zeros, which are zeros again after."""
    BOXES: gl.constexpr = STAGES * BLOCK_K // WIDTH
    dtype: gl.constexpr = mid.dtype.element_ty
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, BLOCK_K], MATRIX)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], MATRIX)
    w_boxes = reinterpret(w_smem, dtype, [BOXES, 64, WIDTH], MATRIX)
    pair_boxes = reinterpret(w_smem, dtype, [BOXES, 4, 2, 8, WIDTH], PAIRS)
    x_boxes = reinterpret(x_smem, dtype, [BOXES, BLOCK_T, WIDTH], MATRIX)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    descs = (o_desc, gate_up_desc, down_desc, qkv_desc, heads_desc, mid_desc, inner_desc, next_desc)
    rings = (w_boxes, pair_boxes, x_boxes, ready, empty)
    sizes = (heads, hidden, inner, qkv)
    vectors = (residual, mid_norm, next_norm, bias)
    outs = (mid, mid_squares, gated, nexts, next_squares, out)
    ring = (w_smem, x_smem, ready, empty)
    gl.warp_specialize([
        (multiply, (vectors, outs, ring, counters, sizes, tokens, eps, BLOCK_T, BLOCK_K, STAGES, PARTS)),
        (copy, (descs, rings, counters, sizes, BLOCK_T, BLOCK_K, STAGES, PDL)),
    ], [1], [24])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- launch


def takes(o: Tensor, gate_up: Tensor, down: Tensor, qkv: Tensor) -> bool:
    """Whether `pack` can have these weights, and is faster than launches of their own."""
    weights = (o, gate_up, down, qkv)
    if sum(w.numel() for w in weights) < LEAST or any(w.dtype != torch.bfloat16 for w in weights):  # fp16: see linear.pack_into_norm
        return False
    return all(linear_hopper.takes(w, gated=w is gate_up) for w in weights)


def pack(
    o: Tensor, gate_up: Tensor, down: Tensor, qkv: Tensor, qkv_bias: Tensor | None, mid_norm: Tensor, next_norm: Tensor, eps: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x [T, K], residual [T, hidden]) -> [T, qkv] for weights that `takes`, and 1 < T <= MAX_TOKENS:

    residual += x o^T;  residual += (silu(g) * u) down^T, where g and u are the norm of that times gate_up^T;  the norm of that times qkv^T (+ bias).

    Rounded as by linear.pack_into_norm and the products behind it. New values in weights must be complete before the kernel ahead starts."""
    hidden, heads = o.shape
    inner, size, parts = down.shape[1], len(qkv), -(-hidden // ROWS)
    programs = multiprocessors(o.device)
    o_desc, down_desc, qkv_desc = (linear_hopper.rows_map(w) for w in (o, down, qkv))
    gate_up_desc = linear_hopper.pairs_map(gate_up)
    counters = torch.zeros(4, dtype=torch.int32, device=o.device)

    def chain(x: Tensor, residual: Tensor) -> Tensor:
        tokens = len(x)
        how = linear_hopper.tile(max(8, 1 << (tokens - 1).bit_length()), 1)

        def new(width: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.empty(tokens, width, dtype=dtype, device=x.device)

        def desc(y: Tensor) -> Any:
            return linear_hopper.tokens_map(y, how.tokens)

        mid, gated, nexts, out = new(hidden), new(inner), new(hidden), new(size)
        mid_squares, next_squares = new(parts, torch.float32), new(parts, torch.float32)
        chain_hopper_kernel[(programs,)](
            o_desc, gate_up_desc, down_desc, qkv_desc, desc(x), desc(mid), desc(gated), desc(nexts), residual, mid_norm, next_norm, qkv_bias,
            mid, mid_squares, gated, nexts, next_squares, out, counters, tokens, heads, hidden, inner, size, eps,
            BLOCK_T=how.tokens, BLOCK_K=how.inputs, STAGES=how.stages, PARTS=max(4, 1 << (parts - 1).bit_length()),
            num_warps=4, maxnreg=168, launch_cooperative_grid=True, **pdl.launch_options(tokens),
        )  # fmt: skip
        return out

    return chain
