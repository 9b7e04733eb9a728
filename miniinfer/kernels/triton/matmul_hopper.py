"""Products of many tokens on Hopper, y = x W^T (+ bias), and silu(gate) * up as their epilogue: a persistent warp-specialised kernel in Gluon.

A warp copies blocks of tokens and of weight rows to shared memory through the tensor memory accelerator, stages ahead; groups of four
warps multiply 64 tokens each by the tile's weight rows and write the result through shared memory, while the copies of the next tile run.
Every sum is one chain of fp32 tensor-core products in ascending order of the inputs, so a token's result depends neither on the number of
tokens nor on the tile sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from miniinfer.kernels.triton.gluon_names import box_load, box_store, reinterpret

BLOCK_K = gl.constexpr(64)  # inputs of a stage: 128 bytes, the swizzle's width
PIECE = gl.constexpr(64)  # columns of a write
MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def find_tile(tile, tiles_m, tiles_n, span):
    """(row, column) of a tile: columns of `span` tiles of tokens at a time, so that what runs at once shares tokens and weights in the L2."""
    band = tile // (span * tiles_n)
    height = gl.minimum(tiles_m - band * span, span)
    within = tile - band * (span * tiles_n)
    return band * span + within % height, within // height


@gluon.jit
def copy_blocks(
    x_desc, w_desc, a_smem, b_boxes, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The copying warp. Of a gated product's tile the first half of the weight rows are gates, the others what they gate."""
    BOXES: gl.constexpr = BLOCK_N // b_boxes.shape[1]
    BOX: gl.constexpr = b_boxes.shape[1]
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = find_tile(tile, tiles_m, tiles_n, span)
        for k in range(blocks):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready.index(stage), (GROUPS * 64 + BLOCK_N) * BLOCK_K * 2)
            for i in gl.static_range(GROUPS):
                box_load(x_desc, [(row * GROUPS + i) * 64, k * BLOCK_K], ready.index(stage), a_smem.index(stage * GROUPS + i))
            for i in gl.static_range(BOXES):
                if GATED:
                    first = column * (BLOCK_N // 2) + i % (BOXES // 2) * BOX + i // (BOXES // 2) * size_n
                else:
                    first = column * BLOCK_N + i * BOX
                box_load(w_desc, [first, k * BLOCK_K], ready.index(stage), b_boxes.index(stage * BOXES + i))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def halves(x):
    """The left and the right half of x's columns; within a thread, without moving data."""
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
    return left, right


@gluon.jit
def write(out_desc, pieces, x, row, column, PART: gl.constexpr, SLOT: gl.constexpr):
    """Columns `column`... of 64 tokens: to shared memory once what lay there has been read, and from there."""
    piece = pieces.index(PART * 2 + SLOT)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    tma.store_wait(1)
    piece.store(gl.convert_layout(x, layout).to(pieces.dtype))
    fence_async_shared()
    box_store(out_desc, [row, column], piece)


@gluon.jit
def multiply(
    out_desc, bias, a_smem, b_smem, pieces, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
    PART: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Four warps: tokens 64 * PART ... of every tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    WIDTH: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([64, BLOCK_N], gl.float32, layout)
        for k in range(blocks):
            mbarrier.wait(ready.index(stage), phase)
            acc = warpgroup_mma(a_smem.index(stage * GROUPS + PART), b_smem.index(stage).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=k > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)

        tile_row, tile_column = find_tile(tile, tiles_m, tiles_n, span)
        row = (tile_row * GROUPS + PART) * 64
        column = tile_column * WIDTH
        if bias is not None:
            columns = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc += gl.load(bias + columns, mask=columns < size_n, other=0.0).to(gl.float32)[None, :]
        if GATED:  # rounded where reference.silu_mul rounds
            gate, up = halves(acc)
            gate = gate.to(pieces.dtype).to(gl.float32)
            gate = (gate * (1.0 / (1.0 + gl.exp(-gate)))).to(pieces.dtype).to(gl.float32)
            acc = gate * up.to(pieces.dtype).to(gl.float32)
        if WIDTH == 64:
            write(out_desc, pieces, acc, row, column, PART, 0)
        elif WIDTH == 128:
            p0, p1 = halves(acc)
            write(out_desc, pieces, p0, row, column, PART, 0)
            write(out_desc, pieces, p1, row, column + 64, PART, 1)
        else:
            left, right = halves(acc)
            p0, p1 = halves(left)
            p2, p3 = halves(right)
            write(out_desc, pieces, p0, row, column, PART, 0)
            write(out_desc, pieces, p1, row, column + 64, PART, 1)
            write(out_desc, pieces, p2, row, column + 128, PART, 0)
            write(out_desc, pieces, p3, row, column + 192, PART, 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "span", "size_n", "blocks"])
def matmul_hopper_kernel(
    x_desc, w_desc, out_desc, bias, tiles_m, tiles_n, span, size_n, blocks,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Persistent programs over tiles_m * tiles_n tiles of 64 * GROUPS tokens and BLOCK_N weight rows; `blocks` of BLOCK_K inputs.

    x_desc: x in boxes [64, BLOCK_K]; w_desc: the weight in boxes [rows, BLOCK_K]; out_desc: the result [T, size_n] in boxes [64, PIECE]."""
    dtype: gl.constexpr = x_desc.dtype
    BOX: gl.constexpr = w_desc.block_shape[0]
    a_smem = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 64, BLOCK_K], MATRIX)
    b_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], MATRIX)
    b_boxes = reinterpret(b_smem, dtype, [STAGES * (BLOCK_N // BOX), BOX, BLOCK_K], MATRIX)
    pieces = gl.allocate_shared_memory(dtype, [GROUPS * 2, 64, PIECE], MATRIX)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (multiply, (out_desc, bias, a_smem, b_smem, pieces, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
                           0, GROUPS, BLOCK_N, STAGES, GATED)),
                (copy_blocks, (x_desc, w_desc, a_smem, b_boxes, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
                              GROUPS, BLOCK_N, STAGES, GATED)),
            ],
            [1], [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply, (out_desc, bias, a_smem, b_smem, pieces, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
                           0, GROUPS, BLOCK_N, STAGES, GATED)),
                (multiply, (out_desc, bias, a_smem, b_smem, pieces, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
                           1, GROUPS, BLOCK_N, STAGES, GATED)),
                (copy_blocks, (x_desc, w_desc, a_smem, b_boxes, ready, empty, tiles_m, tiles_n, span, size_n, blocks,
                              GROUPS, BLOCK_N, STAGES, GATED)),
            ],
            [4, 1], [240, 24],  # registers a thread; the first group gets what is left of 168 * 12 warps: 240
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """How the kernel is launched: groups of 64 tokens and weight rows of a tile, stages, registers a thread at entry; and what a
    tile's time is relative to its area."""

    groups: int
    rows: int
    stages: int
    registers: int
    cost: float


# Smaller tiles read more bytes a product. The costs are from an H200, over weights of 0.6B to 14B models and 256 to 8192 tokens: they choose the
# fastest tile or one within 2 % of it in 43 of 44 cases (the other: 13 %, of 3072 gates at 512 tokens).
TILES = (Tile(2, 256, 4, 168, 1.0), Tile(2, 128, 6, 168, 1.04), Tile(1, 128, 6, 240, 1.35), Tile(1, 64, 8, 240, 2.0))
SPAN = 2048  # tokens whose tiles go over the weight together: what runs at once then shares both in the L2


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch: the tile, how many there are along tokens and along columns, and the useful share of the programs' time."""

    tile: Tile
    tiles_m: int
    tiles_n: int
    share: float


@cache
def plan(tokens: int, width: int, gated: bool, programs: int) -> Plan:
    """The one with which the last of `programs` programs is done first, for results of [tokens, width]."""
    plans = []
    for tile in TILES[:3] if gated else TILES:
        rows = tile.rows // 2 if gated else tile.rows
        tiles_m, tiles_n = -(-tokens // (64 * tile.groups)), -(-width // rows)
        took = -(-tiles_m * tiles_n // programs) * 64 * tile.groups * rows * tile.cost
        plans.append(Plan(tile, tiles_m, tiles_n, tokens * width / (took * programs)))
    return max(plans, key=lambda p: p.share)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a Hopper GPU; 0 for any other device."""
    if device.type != "cuda" or not torch.version.cuda:
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def takes(weight: Tensor, gated: bool = False) -> bool:
    """Whether `pack` can have this weight: 16-bit and by rows, on a Hopper GPU, with sides that the copies can address."""
    n, k = weight.shape
    fits = weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return fits and k % 8 == 0 and n % (16 if gated else 8) == 0 and multiprocessors(weight.device) > 0


def pays(tokens: int, weight: Tensor) -> bool:
    """Whether the gated product beats cuBLAS followed by silu_mul: where tiles fill the programs' last round well enough, 2 to 17 %. Without
    the epilogue cuBLAS is as fast, or faster by up to a third between 300 and 1000 tokens: it has more tile sizes, and clusters."""
    return plan(tokens, len(weight) // 2, True, multiprocessors(weight.device)).share >= 0.9


def pack(weight: Tensor, bias: Tensor | None, gated: bool = False) -> Callable[[Tensor], Tensor]:
    """x [T, K] -> x W^T + b [T, N] for a weight [N, K] that `takes`, read where it lies; T > 0.

    gated: the weight's first half are gates, and the result is silu(gate) * up [T, N / 2], rounded like the reference's silu_mul of the
    product; no bias. x is copied unless its rows lie at multiples of 16 bytes. A token's result does not depend on T."""
    assert not (gated and bias is not None)
    n, k = weight.shape
    width = n // 2 if gated else n
    w_descs = {rows: TensorDescriptor(weight, [n, k], [k, 1], [rows, BLOCK_K.value], MATRIX.value) for rows in (64, 128)}
    programs = multiprocessors(weight.device)

    def product(x: Tensor) -> Tensor:
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        how = plan(len(x), width, gated, programs)
        tile = how.tile
        out = torch.empty(len(x), width, dtype=x.dtype, device=x.device)
        x_desc = TensorDescriptor(x, [len(x), k], [x.stride(0), 1], [64, BLOCK_K.value], MATRIX.value)
        out_desc = TensorDescriptor(out, [len(x), width], [width, 1], [64, PIECE.value], MATRIX.value)
        matmul_hopper_kernel[(min(how.tiles_m * how.tiles_n, programs),)](
            x_desc, w_descs[min(128, tile.rows // 2 if gated else tile.rows)], out_desc, bias,
            how.tiles_m, how.tiles_n, SPAN // (64 * tile.groups), width, -(-k // BLOCK_K.value),
            GROUPS=tile.groups, BLOCK_N=tile.rows, STAGES=tile.stages, GATED=gated, num_warps=4, maxnreg=tile.registers,
        )  # fmt: skip
        return out

    return product
