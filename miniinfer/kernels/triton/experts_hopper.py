"""The products of a mixture of experts on Hopper: a persistent Gluon kernel, for few tokens a stream of weights, for many a matrix product.

Owns the kernel; experts.py owns routing and the launch. Copying warps take tiles (rows of one expert's tokens, rows of its weights) off a
counter and keep a ring of blocks in shared memory full, on into the next tile: weights through the tensor memory accelerator, tokens
through it where they lie in the experts' order, else row by row. Groups of four warps multiply 64 tokens each. Every result is one chain
of products over the inputs in order, so it depends neither on the tile nor on who shares it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from miniinfer.kernels.triton.gluon_names import box_load, element_load, reinterpret

BLOCK_K = gl.constexpr(64)  # inputs of a block: 128 bytes, the swizzle's width
MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def load_rows(x, order, begin, count, x_stride, TOP_K: gl.constexpr, layout: gl.constexpr):
    """(addresses [64, BLOCK_K] of the first inputs of 64 tokens, which of them exist)."""
    offs = gl.arange(0, 64, gl.SliceLayout(1, layout))
    live = offs < count
    token = gl.load(order + begin + offs, mask=live, other=0) // TOP_K
    inputs = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    return x + token.to(gl.int64)[:, None] * x_stride + inputs[None, :], (live[:, None] & (inputs >= 0)[None, :])


@gluon.jit
def copy_tiles(
    x, x_desc, w_desc, order, offsets, ticket, a_smem, b_boxes, notes, tile_ready, tile_empty, ready, empty, x_stride,
    EXPERTS: gl.constexpr, SIZE_N: gl.constexpr, SIZE_K: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warps. They write down each tile for the others, a tile ahead of them; one of no rows is the end."""
    HALF: gl.constexpr = BLOCK_N // 2
    WIDTH: gl.constexpr = HALF if GATED else BLOCK_N  # columns of a tile's result
    BLOCK_M: gl.constexpr = 64 * GROUPS
    BLOCK_E: gl.constexpr = 32 if EXPERTS <= 32 else 64 if EXPERTS <= 64 else 128 if EXPERTS <= 128 else 256 if EXPERTS <= 256 else 512
    by_expert: gl.constexpr = gl.BlockedLayout([BLOCK_E // 32], [32], [gl.num_warps()], [0])
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    experts = gl.arange(0, BLOCK_E, by_expert)
    sizes = gl.load(offsets + experts + 1, mask=experts < EXPERTS, other=0) - gl.load(offsets + experts, mask=experts < EXPERTS, other=0)
    ends = gl.associative_scan((sizes + (BLOCK_M - 1)) // BLOCK_M * ((SIZE_N + WIDTH - 1) // WIDTH), 0, _add)
    tiles = gl.max(ends, 0)
    at = 0  # blocks so far
    tile = 0
    work = gl.program_id(0)
    while work < tiles:
        expert = gl.sum((ends <= work).to(gl.int32), 0)
        local = work - gl.max(gl.where(ends <= work, ends, 0), 0)
        begin = gl.load(offsets + expert)
        end = gl.load(offsets + expert + 1)
        deep = (end - begin + (BLOCK_M - 1)) // BLOCK_M
        begin += local % deep * BLOCK_M
        count = gl.minimum(end - begin, BLOCK_M)
        column = local // deep
        slot = tile & 1
        mbarrier.wait(tile_empty.index(slot), ((tile >> 1) & 1) ^ 1)
        notes.index(slot * 4).store(gl.full([1], begin, gl.int32, scalar))
        notes.index(slot * 4 + 1).store(gl.full([1], count, gl.int32, scalar))
        notes.index(slot * 4 + 2).store(gl.full([1], column, gl.int32, scalar))
        mbarrier.arrive(tile_ready.index(slot), count=1)
        tile += 1
        if GATED:
            row = expert * (2 * SIZE_N) + column * WIDTH
            other = row + SIZE_N
            at0, live0 = load_rows(x, order, begin, count, x_stride, TOP_K, rows_layout)
            at1, live1 = load_rows(x, order, begin + 64, count - 64, x_stride, TOP_K, rows_layout)
        else:
            row = expert * SIZE_N + column * WIDTH
            other = row + HALF
        for k in range(0, SIZE_K, BLOCK_K):
            stage = at % STAGES
            mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (BLOCK_N + (0 if GATED else BLOCK_M)) * BLOCK_K * 2)
            box_load(w_desc, [row, k], ready.index(stage), b_boxes.index(stage * 2))
            box_load(w_desc, [other, k], ready.index(stage), b_boxes.index(stage * 2 + 1))
            if GATED:
                if SIZE_K % BLOCK_K:
                    within = (gl.arange(0, BLOCK_K, gl.SliceLayout(0, rows_layout)) < SIZE_K - k)[None, :]
                    element_load(a_smem.index(stage * GROUPS), at0 + k, mask=live0 & within)
                    if GROUPS > 1:
                        element_load(a_smem.index(stage * GROUPS + 1), at1 + k, mask=live1 & within)
                else:
                    element_load(a_smem.index(stage * GROUPS), at0 + k, mask=live0)
                    if GROUPS > 1:
                        element_load(a_smem.index(stage * GROUPS + 1), at1 + k, mask=live1)
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            else:
                for group in gl.static_range(GROUPS):
                    box_load(x_desc, [begin + group * 64, k], ready.index(stage), a_smem.index(stage * GROUPS + group))
            at += 1
        work = gl.num_programs(0) + gl.atomic_add(ticket, 1, sem="relaxed")
    slot = tile & 1
    mbarrier.wait(tile_empty.index(slot), ((tile >> 1) & 1) ^ 1)
    notes.index(slot * 4 + 1).store(gl.full([1], 0, gl.int32, scalar))
    mbarrier.arrive(tile_ready.index(slot), count=1)


@gluon.jit
def multiply_tiles(
    out, order, a_smem, b_smem, o_smem, notes, tile_ready, tile_empty, ready, empty,
    PART: gl.constexpr, SIZE_N: gl.constexpr, SIZE_K: gl.constexpr, GATED: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: tokens PART * 64 ... of every tile."""
    HALF: gl.constexpr = BLOCK_N // 2
    WIDTH: gl.constexpr = HALF if GATED else BLOCK_N
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = out.dtype.element_ty
    staged = o_smem.index(PART)
    offs_m = gl.arange(0, 64, gl.SliceLayout(1, rows_layout))
    offs_n = gl.arange(0, HALF, gl.SliceLayout(0, rows_layout))
    at = 0
    tile = 0
    more = True
    while more:
        slot = tile & 1
        mbarrier.wait(tile_ready.index(slot), (tile >> 1) & 1)
        begin = gl.max(notes.index(slot * 4).load(scalar), 0) + PART * 64
        count = gl.max(notes.index(slot * 4 + 1).load(scalar), 0)
        column = gl.max(notes.index(slot * 4 + 2).load(scalar), 0) * WIDTH
        mbarrier.arrive(tile_empty.index(slot), count=1)
        tile += 1
        more = count > 0
        if more:
            if count <= PART * 64:  # none for these warps: the blocks pass by
                for _ in range(0, SIZE_K, BLOCK_K):
                    mbarrier.wait(ready.index(at % STAGES), (at // STAGES) & 1)
                    mbarrier.arrive(empty.index(at % STAGES), count=1)
                    at += 1
            else:
                live = offs_m < count - PART * 64
                place = (begin + offs_m) if GATED else gl.load(order + begin + offs_m, mask=live, other=0)
                target = out + place.to(gl.int64)[:, None] * SIZE_N + (column + offs_n)[None, :]
                acc = gl.zeros([64, BLOCK_N], gl.float32, acc_layout)
                for k in range(0, SIZE_K, BLOCK_K):
                    stage = at % STAGES
                    mbarrier.wait(ready.index(stage), (at // STAGES) & 1)
                    if GATED:
                        fence_async_shared()
                    acc = warpgroup_mma(a_smem.index(stage * GROUPS + PART), b_smem.index(stage).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    if k > 0:
                        mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)
                    at += 1
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index((at - 1) % STAGES), count=1)

                # By way of shared memory, so that rows are written whole.
                left, right = acc.reshape([64, 2, HALF]).permute((0, 2, 1)).split()
                if GATED:
                    gate = left.to(dtype).to(gl.float32)
                    gate = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
                    staged.store((gate * right.to(dtype).to(gl.float32)).to(dtype))
                    gl.store(target, staged.load(rows_layout), mask=live[:, None] & (column + offs_n < SIZE_N)[None, :])
                else:
                    staged.store(left.to(dtype))
                    gl.store(target, staged.load(rows_layout), mask=live[:, None] & (column + offs_n < SIZE_N)[None, :])
                    staged.store(right.to(dtype))
                    gl.store(target + HALF, staged.load(rows_layout), mask=live[:, None] & (column + offs_n < SIZE_N - HALF)[None, :])


@gluon.jit
def expert_hopper_kernel(
    x, x_desc, w_desc, out, order, offsets, ticket, x_stride,
    EXPERTS: gl.constexpr, SIZE_N: gl.constexpr, SIZE_K: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """GATED: out[i] = silu(gate) * up of x[order[i] // TOP_K], the tokens in the experts' order; else out[order[i]] = x[i] @ weight[expert].T.

    w_desc: the weight as [E * rows, SIZE_K] in boxes [BLOCK_N // 2, BLOCK_K]; x_desc, if not GATED: x in boxes [64, BLOCK_K]. order: the
    pairs (token * TOP_K + choice) by expert, each expert's from offsets[e] on; ticket: a zero."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = out.dtype.element_ty
    a_smem = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 64, BLOCK_K], MATRIX)
    b_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], MATRIX)
    b_boxes = reinterpret(b_smem, dtype, [STAGES * 2, BLOCK_N // 2, BLOCK_K], MATRIX)
    o_smem = gl.allocate_shared_memory(dtype, [GROUPS, 64, BLOCK_N // 2], MATRIX)
    notes = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    tile_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=129 if GATED else 1)  # each copying thread's rows, and the weights
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(tile_ready.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=GROUPS)
    fence_async_shared()

    if GROUPS == 1:
        gl.warp_specialize(
            [
                (multiply_tiles, (out, order, a_smem, b_smem, o_smem, notes, tile_ready, tile_empty, ready, empty, 0, SIZE_N, SIZE_K, GATED,
                                  GROUPS, BLOCK_N, STAGES)),
                (copy_tiles, (x, x_desc, w_desc, order, offsets, ticket, a_smem, b_boxes, notes, tile_ready, tile_empty, ready, empty, x_stride,
                              EXPERTS, SIZE_N, SIZE_K, TOP_K, GATED, GROUPS, BLOCK_N, STAGES)),
            ],
            [4 if GATED else 1],
            [REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply_tiles, (out, order, a_smem, b_smem, o_smem, notes, tile_ready, tile_empty, ready, empty, 0, SIZE_N, SIZE_K, GATED,
                                  GROUPS, BLOCK_N, STAGES)),
                (multiply_tiles, (out, order, a_smem, b_smem, o_smem, notes, tile_ready, tile_empty, ready, empty, 1, SIZE_N, SIZE_K, GATED,
                                  GROUPS, BLOCK_N, STAGES)),
                (copy_tiles, (x, x_desc, w_desc, order, offsets, ticket, a_smem, b_boxes, notes, tile_ready, tile_empty, ready, empty, x_stride,
                              EXPERTS, SIZE_N, SIZE_K, TOP_K, GATED, GROUPS, BLOCK_N, STAGES)),
            ],
            [4, 4 if GATED else 1],
            [216, REGISTERS],
        )  # fmt: skip
