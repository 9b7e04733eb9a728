"""Linear layers of few tokens on Hopper at the memory's rate, y = x W^T (+ bias), and silu(gate) * up as their epilogue: a Gluon kernel.

Weight rows are the rows of the tensor cores' products and tokens the columns, so that 8 tokens cost no more than 8. A warp copies blocks of
weights and tokens to a deep ring in shared memory through the tensor memory accelerator, the first weights before the kernel ahead of this
one is done; groups of four warps multiply 64 weight rows each. Every sum is one chain of fp32 tensor-core products in ascending order of the
inputs, so a token's result depends neither on the number of tokens nor on the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from miniinfer.kernels.triton import pdl
from miniinfer.kernels.triton.gluon_names import box_load, reinterpret
from miniinfer.kernels.triton.matmul_hopper import multiprocessors
from miniinfer.kernels.triton.unscaled import Unscaled

ROWS = 64  # of a weight, that a group of four warps takes
FEW_TOKENS, MAX_TOKENS = 32, 128  # above them tiles have to be full, and tiles of many tokens are faster
MORE_TOKENS = 256  # the latter for weights of at most
SMALL = 8 << 20  # numbers
WIDTH = gl.constexpr(64)  # numbers in a row of a copied box: 128 bytes, the swizzle's width
MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PAIRS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def share(tiles):
    """(first, end) of this program's tiles."""
    return gl.program_id(0) * tiles // gl.num_programs(0), (gl.program_id(0) + 1) * tiles // gl.num_programs(0)


@gluon.jit
def fence_async():
    """Between numbers that threads write to memory and copies that read them."""
    gl.inline_asm_elementwise("fence.proxy.async; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_weights(desc, boxes, bar, stage, tile, block, GROUPS: gl.constexpr, BLOCK_K: gl.constexpr, GATED: gl.constexpr):
    BOXES: gl.constexpr = BLOCK_K // WIDTH
    for i in gl.static_range(GROUPS * BOXES):
        box = boxes.index(stage * (GROUPS * BOXES) + i)
        group = tile * GROUPS + i // BOXES
        column = block * BLOCK_K + i % BOXES * WIDTH
        if GATED:
            box_load(desc, [group * 4, 0, 0, column], bar, box)
        else:
            box_load(desc, [group * 64, column], bar, box)


@gluon.jit
def copy_tokens(desc, boxes, bar, stage, first, block, BLOCK_K: gl.constexpr):
    BOXES: gl.constexpr = BLOCK_K // WIDTH
    for i in gl.static_range(BOXES):
        box_load(desc, [first, block * BLOCK_K + i * WIDTH], bar, boxes.index(stage * BOXES + i))


@gluon.jit
def turn(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and whether the lap that it is in is an odd one."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def copy_product(
    job, ring, stage, phase, counter, target,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A product's copies. Units are its tiles' blocks, one after the other; the first that the ring holds get their weights before there are
    tokens, which is when the kernel ahead is done, or if there is a counter, when that has come to the target.

    Returns the stage and phase that the ring is then at."""
    w_desc, x_desc, begin, end, blocks, columns = job
    w_boxes, x_boxes, ready, empty = ring
    BYTES: gl.constexpr = (GROUPS * 64 + BLOCK_T) * BLOCK_K * 2
    first = begin * blocks
    last = end * blocks
    ahead = gl.minimum(last - first, STAGES)
    x_stage = stage
    for unit in range(first, first + ahead):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        copy_weights(w_desc, w_boxes, ready.index(stage), stage, unit // blocks // columns, unit % blocks, GROUPS, BLOCK_K, GATED)
        stage, phase = turn(stage, phase, STAGES)
    if counter is None:
        pdl.begin(PDL)
    elif ahead > 0:
        while gl.atomic_add(counter, 0, sem="acquire") < target:
            pass
        fence_async()
    for unit in range(first, first + ahead):
        copy_tokens(x_desc, x_boxes, ready.index(x_stage), x_stage, unit // blocks % columns * BLOCK_T, unit % blocks, BLOCK_K)
        x_stage = gl.where(x_stage == STAGES - 1, 0, x_stage + 1)
    tile = (first + ahead) // blocks
    block = (first + ahead) % blocks
    for _ in range(first + ahead, last):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), BYTES)
        copy_weights(w_desc, w_boxes, ready.index(stage), stage, tile // columns, block, GROUPS, BLOCK_K, GATED)
        copy_tokens(x_desc, x_boxes, ready.index(stage), stage, tile % columns * BLOCK_T, block, BLOCK_K)
        stage, phase = turn(stage, phase, STAGES)
        block += 1
        if block == blocks:
            block = 0
            tile += 1
    return stage, phase


@gluon.jit
def copy(
    job, ring, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The copying warp of a program of one product."""
    start = gl.program_id(0) * 0
    copy_product(job, ring, start, start, None, 0, BLOCK_T, BLOCK_K, STAGES, GROUPS, GATED, PDL)


@gluon.jit
def load_squares(squares, first, tokens, parts, BLOCK_T: gl.constexpr, PARTS: gl.constexpr):
    """The `parts` sums of squares of BLOCK_T tokens."""
    ACROSS: gl.constexpr = min(32, PARTS // 4)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    token = first + gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
    part = gl.arange(0, PARTS, gl.SliceLayout(0, layout))
    mask = (token < tokens)[:, None] & (part < parts)[None, :]
    return gl.load(squares + token[:, None] * parts + part[None, :], mask=mask, other=0.0)


@gluon.jit
def norm_scale(parts, size, eps, layout: gl.constexpr):
    """1 / rms of tokens from such parts, in the columns of `layout`."""
    return gl.convert_layout(gl.rsqrt(gl.sum(parts, 1) / size + eps), gl.SliceLayout(0, layout))


@gluon.jit
def multiply_product(
    GROUP: gl.constexpr, args, ring, stage, phase,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 weight rows of a product's every tile. They read and write what others have made only after tokens have come.

    Returns the stage and phase that the ring is then at."""
    bias, residual, norm, squares, out, begin, end, blocks, columns, tokens, size_n, parts, size, eps = args
    w_smem, x_smem, ready, empty = ring
    ROWS: gl.constexpr = 32 if GATED else 64  # of the result
    LATE: gl.constexpr = BLOCK_T * PARTS <= 128 * 16  # so few numbers of a thread may wait in registers: nothing waits for them
    VECTOR: gl.constexpr = min(8, ROWS * BLOCK_T // 128)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    store_layout: gl.constexpr = gl.BlockedLayout([VECTOR, 1], [ROWS // 4 // VECTOR, 128 * VECTOR // ROWS], [4, 1], [0, 1])
    dtype: gl.constexpr = out.dtype.element_ty
    acc_rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, store_layout))
    cols = gl.arange(0, BLOCK_T, gl.SliceLayout(0, store_layout))
    for tile in range(begin, end):
        acc = gl.zeros([64, BLOCK_T], gl.float32, layout)
        first = (tile // columns * GROUPS + GROUP) * ROWS
        token = tile % columns * BLOCK_T + cols
        at = gl.cast(token, gl.int64)[None, :] * size_n + (first + rows)[:, None]
        mask = (first + rows < size_n)[:, None] & (token < tokens)[None, :]
        if squares is not None:
            mbarrier.wait(ready.index(stage), phase)
            if residual is not None:
                addend = gl.load(residual + at, mask=mask, other=0.0)
            else:
                sums = load_squares(squares, tile % columns * BLOCK_T, tokens, parts, BLOCK_T, PARTS)
                if not LATE:
                    scale = norm_scale(sums, size, eps, layout)
        for block in range(blocks):
            mbarrier.wait(ready.index(stage), phase)
            acc = warpgroup_mma(w_smem.index(stage * GROUPS + GROUP), x_smem.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the one of the block before
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=block > 0)
            stage, phase = turn(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)

        if squares is not None and residual is None:
            if LATE:
                scale = norm_scale(sums, size, eps, layout)
            acc = acc * scale[None, :]
        if GATED:  # eight rows of gates, then the eight that they gate, which lie in the same threads
            if bias is not None:
                pair = first + acc_rows // 16 * 8 + acc_rows % 8
                acc += gl.load(bias + acc_rows // 8 % 2 * size_n + pair, mask=pair < size_n, other=0.0).to(gl.float32)[:, None]
            gate, up = gl.split(gl.permute(gl.reshape(acc.to(dtype), [4, 2, 8, BLOCK_T]), (0, 2, 3, 1)))
            gate = gl.convert_layout(gl.reshape(gate, [ROWS, BLOCK_T]), store_layout).to(gl.float32)
            up = gl.convert_layout(gl.reshape(up, [ROWS, BLOCK_T]), store_layout).to(gl.float32)
            result = ((gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32) * up).to(dtype)
        else:
            if bias is not None:
                acc += gl.load(bias + first + acc_rows, mask=first + acc_rows < size_n, other=0.0).to(gl.float32)[:, None]
            result = gl.convert_layout(acc.to(dtype), store_layout)
        if residual is not None:
            result = (result.to(gl.float32) + addend.to(gl.float32)).to(dtype)
            gl.store(residual + at, result, mask=mask)
            value = result.to(gl.float32)
            part = tile // columns * GROUPS + GROUP
            gl.store(squares + token * parts + part, gl.sum(value * value, 0), mask=(token < tokens) & (part < parts))
            result = (value * gl.load(norm + first + rows, mask=first + rows < size_n, other=0.0).to(gl.float32)[:, None]).to(dtype)
        gl.store(out + at, result, mask=mask)
    return stage, phase


@gluon.jit
def multiply(
    GROUP: gl.constexpr, args, ring, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """A group of warps of a program of one product."""
    start = gl.program_id(0) * 0
    multiply_product(GROUP, args, ring, start, start, BLOCK_T, STAGES, GROUPS, GATED, PARTS)


@gluon.jit(do_not_specialize=["tokens", "blocks", "columns", "tiles", "parts", "size", "eps"])
def linear_hopper_kernel(
    w_desc, x_desc, bias, residual, norm, squares, out, tokens, size_n, blocks, columns, tiles, parts, size, eps,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr,
    REGISTERS: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Persistent programs over tiles of 64 * GROUPS weight rows and BLOCK_T tokens, numbered by rows, then by their `columns` of tokens.

    w_desc: the weight [N, K] in boxes [64, WIDTH], or GATED: [I / 8, 2, 8, K], which is eight gates, eight ups, and so on, in boxes
    [4, 2, 8, WIDTH]; x_desc: tokens [T, K] in boxes [BLOCK_T, WIDTH], zeros after the last; out: [T, size_n]. `blocks` of BLOCK_K inputs.

    squares, without a residual: sums of squares [T, parts] of tokens of `size` numbers; the result is divided by their root mean square. With a
    residual [T, size_n], which the result is added to in place: they are written, a part for every 64 rows, and out is the sum times norm."""
    BOXES: gl.constexpr = STAGES * BLOCK_K // WIDTH
    dtype: gl.constexpr = out.dtype.element_ty
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 64, BLOCK_K], MATRIX)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], MATRIX)
    # A swizzled matrix is its column blocks of WIDTH, one after the other, each of them rows of 128 bytes: the boxes as they arrive.
    if GATED:
        w_boxes = reinterpret(w_smem, dtype, [BOXES * GROUPS, 4, 2, 8, WIDTH], PAIRS)
    else:
        w_boxes = reinterpret(w_smem, dtype, [BOXES * GROUPS, 64, WIDTH], MATRIX)
    x_boxes = reinterpret(x_smem, dtype, [BOXES, BLOCK_T, WIDTH], MATRIX)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()

    begin, end = share(tiles)
    copied = (w_desc, x_desc, begin, end, blocks, columns)
    boxes = (w_boxes, x_boxes, ready, empty)
    multiplied = (bias, residual, norm, squares, out, begin, end, blocks, columns, tokens, size_n, parts, size, eps)
    ring = (w_smem, x_smem, ready, empty)
    if GROUPS == 1:
        gl.warp_specialize([
            (multiply, (0, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (copy, (copied, boxes, BLOCK_T, BLOCK_K, STAGES, GROUPS, GATED, PDL)),
        ], [1], [24])  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize([
            (multiply, (0, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (multiply, (1, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (copy, (copied, boxes, BLOCK_T, BLOCK_K, STAGES, GROUPS, GATED, PDL)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (multiply, (0, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (multiply, (1, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (multiply, (2, multiplied, ring, BLOCK_T, STAGES, GROUPS, GATED, PARTS)),
            (copy, (copied, boxes, BLOCK_T, BLOCK_K, STAGES, GROUPS, GATED, PDL)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- launch

RING = 200 * 1024  # bytes of shared memory for stages: with less of them under way, few programs do not reach the memory's rate
READ, INTO_ONE, INTO_ALL = 4.5e6, 0.112e6, 10e6  # bytes/us of an H200: from memory, and from the L2 cache into one and into all multiprocessors


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens and groups of 64 weight rows of a tile, inputs of a stage, and stages."""

    tokens: int
    groups: int
    inputs: int
    stages: int

    @property
    def registers(self) -> int:
        """A thread's, on average, in a program of `groups` * 4 warps and a copying warp's four (three idle)."""
        return 128 if self.tokens > 64 else (96, 80, 80 if self.tokens > 32 else 64)[self.groups - 1]


def tile(tokens: int, groups: int) -> Tile:
    """With as many inputs in a stage, side by side in memory, as leave five stages."""
    stages = {inputs: RING // ((groups * 64 + tokens) * inputs * 2) for inputs in (256, 128, 64)}
    inputs = next(i for i in stages if stages[i] >= 5)
    return Tile(tokens, groups, inputs, min(stages[inputs], 16))


@cache
def tile_for(tokens: int, rows: int, inputs: int, programs: int) -> Tile:
    """The tile with which the slowest of what must be done is done first: the read, and copies into the busiest and into all multiprocessors.

    On an H200 within 3 % of the best of some 11 to 30 launches in 64 of 68 cases, weights of 0.6B to 14B models at 8 to 128 tokens, one after
    the other. (The worst: 21 %, 5120 x 17408 at 8 tokens, which is faster with half the ring.) Between other kernels of a layer, which a
    program of more warps delays, fewer groups are better than that by 1 to 4 %, hence the hundredth for each."""
    least = min(128, max(8, 1 << (tokens - 1).bit_length()))

    def time(candidate: Tile) -> float:
        tiles = -(-rows // (64 * candidate.groups)) * -(-tokens // candidate.tokens)
        copied = (64 * candidate.groups + candidate.tokens) * inputs * 2
        parts = rows * inputs * 2 / READ, -(-tiles // programs) * copied / INTO_ONE, tiles * copied / INTO_ALL
        return (max(parts) + 0.05 * sum(parts)) * (1 + 0.01 * candidate.groups)

    sizes = [least, least // 2] if least >= 64 else [least]
    return min((tile(size, groups) for size in sizes for groups in (1, 2, 3)), key=time)


def takes(weight: Tensor, gated: bool = False) -> bool:
    """Whether `pack` can have this weight: 16-bit and by rows, on a Hopper GPU, with sides that copies can address."""
    n, k = weight.shape
    fits = weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return fits and k % 8 == 0 and n % (16 if gated else 1) == 0 and multiprocessors(weight.device) > 0


def small(weight: Tensor) -> bool:
    """Whether launches and waits cost more than the read of the weight."""
    return weight.numel() <= SMALL


def pays(tokens: int, weight: Tensor) -> bool:
    """Whether this is as fast a way as any. Of large weights a tile of many tokens has to be full: copies of tokens that do not exist are slow,
    8B with 96 of 128 by a seventh."""
    if small(weight):
        return tokens <= MORE_TOKENS
    return tokens <= FEW_TOKENS or (tokens <= MAX_TOKENS and tokens % 64 == 0)


def rows_map(weight: Tensor) -> TensorDescriptor:
    """Of a weight [N, K]: boxes of 64 rows."""
    n, k = weight.shape
    return TensorDescriptor(weight, [n, k], [k, 1], [64, WIDTH.value], MATRIX.value)


def pairs_map(weight: Tensor) -> TensorDescriptor:
    """Of a weight [2 I, K] of gates, then ups: boxes of eight gates and their eight ups, four times."""
    n, k = weight.shape
    return TensorDescriptor(weight, [n // 16, 2, 8, k], [8 * k, n // 2 * k, k, 1], [4, 2, 8, WIDTH.value], PAIRS.value)


def tokens_map(x: Tensor, count: int) -> TensorDescriptor:
    """Of tokens [T, K], whose rows lie at multiples of 16 bytes: boxes of `count` of them."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [count, WIDTH.value], MATRIX.value)


def pack(weight: Tensor, bias: Tensor | None, gated: bool = False) -> Callable[..., Tensor]:
    """(x [T, K]) -> x W^T + b [T, N] for a weight [N, K] that `takes`, read where it lies; T > 0. x is copied
    unless its rows lie at multiples of 16 bytes; it may be Unscaled. A token's result does not depend on T.

    gated: the weight's first half are gates, and the result is silu(gate) * up [T, N / 2], rounded like the reference's silu_mul of the
    product. New values in the weight must be complete before the kernel ahead of this one starts.

    (x, residual [T, N], norm [N], squares [T, ceil(N / 64)] fp32), not gated -> the values of an Unscaled: the product is added to the residual,
    and the sum's squares are written."""
    n, k = weight.shape
    programs = multiprocessors(weight.device)
    size_n, w_desc = (n // 2, pairs_map(weight)) if gated else (n, rows_map(weight))

    def product(x: Tensor | Unscaled, residual: Tensor | None = None, norm: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
        eps = 0.0
        if isinstance(x, Unscaled):
            squares, eps, x = x.squares, x.eps, x.values
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        tokens, parts = len(x), 0 if squares is None else squares.shape[1]
        how = tile_for(tokens, n, k, programs)
        out = torch.empty(tokens, size_n, dtype=x.dtype, device=x.device)
        x_desc = tokens_map(x, how.tokens)
        columns = -(-tokens // how.tokens)
        tiles = -(-n // (64 * how.groups)) * columns
        linear_hopper_kernel[(min(tiles, programs),)](
            w_desc, x_desc, bias, residual, norm, squares, out, tokens, size_n, -(-k // how.inputs), columns, tiles, parts, k, eps,
            BLOCK_T=how.tokens, BLOCK_K=how.inputs, STAGES=how.stages, GROUPS=how.groups, GATED=gated,
            REGISTERS=(how.registers * (how.groups + 1) - 24) // how.groups // 8 * 8, PARTS=max(4, 1 << (parts - 1).bit_length()) if parts else 0,
            num_warps=4, maxnreg=how.registers, **pdl.launch_options(tokens),
        )  # fmt: skip
        return out

    return product
