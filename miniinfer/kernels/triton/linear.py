"""Linear layers of few tokens, where the product is a read of the weight: which kernel reads it at the memory's rate.

One token: a program takes rows of the weight whole, in registers, and has the first of them under way before its inputs are there
(`_rows_kernel`). More: linear_hopper.py, where that `pays`; on other GPUs, and for weights of few rows, tensor-core tiles of weight rows by
tokens up to MAX_TOKENS, with the inputs split over programs where rows are few (`_tile_kernel`). More tokens yet are F.linear's, or
matmul_hopper.py's where that pays; fp32 and odd shapes F.linear's at any number.

A norm between two products of few tokens by small weights needs no kernel (`pack_into_norm`): the first product adds to the residual, the
second scales its sums. By large weights, all products between two attentions are one (`pack_chain`, chain_hopper.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton import pdl
from miniinfer.kernels.triton.rowwise import add_rms_norm, rms_norm, silu_mul
from miniinfer.kernels.triton.unscaled import Unscaled

try:
    from miniinfer.kernels.triton import chain_hopper, linear_hopper, matmul_hopper
except ImportError:  # Gluon is experimental and may move
    chain_hopper = linear_hopper = matmul_hopper = None  # type: ignore[assignment]

MAX_TOKENS = 32  # of _tile_kernel
MANY_ROWS = 1024  # of a weight: with fewer, linear_hopper.py's tiles of 64 leave most of the GPU idle
MANY_TOKENS = 256  # above them cuBLAS adds to the residual itself
Function = Callable[..., Tensor]  # of x [..., K], or of an Unscaled


@dataclass(frozen=True, slots=True)
class Ready:
    """What the product would make of it is there already: a chain has computed it."""

    values: Tensor


@triton.jit
def _rows_kernel(
    x, weight, bias, out, SIZE_N, SIZE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr
):
    """Program i: weight rows i * BLOCK_N ... times x. The rows' next block is on its way while one is multiplied.

    GATED: the weight is SIZE_N rows of gates, then as many of ups; a program takes BLOCK_N / 2 pairs, and out is silu(gate) * up."""
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(index // 2, SIZE_N - 1) + index % 2 * SIZE_N if GATED else tl.minimum(index, SIZE_N - 1)
    offs = tl.arange(0, BLOCK_K)
    even: tl.constexpr = SIZE_K % BLOCK_K == 0
    source = weight + rows.to(tl.int64)[:, None] * SIZE_K + offs[None, :]
    if even:
        block = tl.load(source, eviction_policy="evict_first")
    else:
        block = tl.load(source, mask=(offs < SIZE_K)[None, :], other=0.0, eviction_policy="evict_first")
    pdl.begin(PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)  # the 8 inputs of a 16-byte load are summed in their thread
    for k in range(0, SIZE_K, BLOCK_K):
        if even:
            values = tl.load(x + k + offs)
            within = k + BLOCK_K + 0 * offs < SIZE_K
        else:
            values = tl.load(x + k + offs, mask=k + offs < SIZE_K, other=0.0)
            within = k + BLOCK_K + offs < SIZE_K
        products = block.to(tl.float32) * values.to(tl.float32)[None, :]
        if SIZE_K > BLOCK_K:
            block = tl.load(source + k + BLOCK_K, mask=within[None, :], other=0.0, eviction_policy="evict_first")
        sums += tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // 8, 8]), 2)
    result = tl.sum(sums, 1)
    if bias is not None:
        result += tl.load(bias + rows).to(tl.float32)
    if GATED:
        index = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.reshape(result.to(out.dtype.element_ty).to(tl.float32), [BLOCK_N // 2, 2]))
        result = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32) * up
    tl.store(out + index, result, mask=index < SIZE_N)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _tile_kernel(
    x, weight, bias, out, partial, counters, tokens, SIZE_N, SIZE_K, x_stride, span, splits,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, s): weight rows i * BLOCK_N ... times all tokens, over inputs s * span ... With SPLIT the partial sums go to partial
    [splits, tokens, N] fp32, and whichever program of an i comes last adds them up in the order of s; it leaves the counter at 0."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_T)
    offs = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, SIZE_K)
    w_source = weight + tl.minimum(rows, SIZE_N - 1).to(tl.int64)[:, None] * SIZE_K + offs[None, :]
    x_source = x + cols[None, :] * x_stride + offs[:, None]
    x_mask = (cols < tokens)[None, :]
    if PREFETCH > 0:  # the first of each row into the L2 cache, while the inputs are still being computed
        heads = (weight + tl.minimum(rows, SIZE_N - 1).to(tl.int64) * SIZE_K + begin).to(tl.int64, bitcast=True)
        sizes = tl.minimum(end - begin, PREFETCH) * 2 + 0 * rows
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [heads, sizes], dtype=tl.int32, is_pure=False, pack=1
        )
    pdl.begin(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            block = tl.load(w_source + k, eviction_policy="evict_first")
            values = tl.load(x_source + k, mask=x_mask, other=0.0)
        else:
            block = tl.load(w_source + k, mask=(k + offs < end)[None, :], other=0.0, eviction_policy="evict_first")
            values = tl.load(x_source + k, mask=x_mask & (k + offs < end)[:, None], other=0.0)
        acc = tl.dot(block, values, acc, input_precision="ieee")
    result = tl.trans(acc)
    at = cols[:, None] * SIZE_N + rows[None, :]
    mask = (cols < tokens)[:, None] & (rows < SIZE_N)[None, :]
    if SPLIT:
        tl.store(partial + tl.program_id(1) * tokens * SIZE_N + at, result, mask=mask)
        tl.debug_barrier()  # all of the program's sums are written before its arrival counts
        arrived = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel")
        if arrived < splits - 1:
            return
        result = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for s in range(splits):
            result += tl.load(partial + s * tokens * SIZE_N + at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counters + tl.program_id(0), 0)
    if bias is not None:
        result += tl.load(bias + rows, mask=rows < SIZE_N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, result, mask=mask)


@dataclass(frozen=True, slots=True)
class Rows:
    """How _rows_kernel is launched: weight rows and inputs of a block, warps of a program."""

    block_n: int
    block_k: int
    warps: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """How _tile_kernel is launched. `split` parts the inputs over as many programs at most; the order of sums depends on it alone."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int
    prefetch: int  # inputs of each row to fetch ahead of x; 0 below Hopper


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, how: Rows, gated: bool = False) -> Tensor:
    """[1, K] -> [1, N]; weight contiguous. Gated: weight [2 I, K] of gates and ups -> silu(gate) * up [1, I]."""
    rows, k = weight.shape
    n = rows // 2 if gated else rows
    block_n = max(2, how.block_n) if gated else how.block_n  # a pair at least
    warps = how.warps * block_n // how.block_n
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    _rows_kernel[(triton.cdiv(rows, block_n),)](
        x, weight, bias, out, n, SIZE_K=k, BLOCK_N=block_n, BLOCK_K=how.block_k, GATED=gated, num_warps=warps, **pdl.launch_options(1)
    )
    return out


def tiled(x: Tensor, weight: Tensor, bias: Tensor | None, counters: Tensor, how: Tiles) -> Tensor:
    """[T, K] -> [T, N]; weight contiguous, x by rows. `counters`: int32 zeros, one for each block of rows; they are zeros again after."""
    tokens, (n, k) = len(x), weight.shape
    span = triton.cdiv(k, how.split * 128) * 128
    splits = triton.cdiv(k, span)
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    partial = torch.empty(splits, tokens, n, dtype=torch.float32, device=x.device) if splits > 1 else None
    _tile_kernel[(triton.cdiv(n, how.block_n), splits)](
        x, weight, bias, out, partial, counters, tokens, n, k, x.stride(0), span, splits,
        BLOCK_T=max(16, triton.next_power_of_2(tokens)), BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_K=k % 128 == 0 and span % how.block_k == 0,
        SPLIT=splits > 1, PREFETCH=how.prefetch, num_warps=how.warps, num_stages=how.stages, **pdl.launch_options(tokens),
    )  # fmt: skip
    return out


def rows_for(n: int, k: int) -> Rows:
    """Measured on an H200 over the public shapes of 0.6B to 30B models: within 5 % of the best of some 40 launches for each."""
    if k < 512:
        return Rows(4, 256, 1)
    if n <= 2048 or k >= 4096:
        return Rows(1, 1024, 4)
    return Rows(4, 1024, 4) if k >= 2048 else Rows(4, 512, 4)


def tiles_for(n: int, k: int) -> Tiles:
    """Measured likewise, at 8 and 32 tokens: large tiles where rows abound, and at least some 64 programs where they are few. GPUs before
    Hopper have less shared memory: fewer stages."""
    hopper = pdl.available()
    if n >= 28_000 and hopper:
        return Tiles(128, 128, 8, 3, 1, 0)
    block_n, warps, least = (16, 2, 256) if n <= 512 else (64, 4, 512)
    split = 1
    while triton.cdiv(n, block_n) * split < 64 and k >= 2 * split * least:
        split *= 2
    return Tiles(block_n, 128, warps, 6 if hopper else 3, split, 512 if n <= 4096 and hopper else 0)


def pack_linear(weight: Tensor, bias: Tensor | None) -> Function:
    """x [..., K] -> x W^T + b [..., N] for weight [N, K], which is read where it lies.

    The order of sums is fixed by the weight's shape and by whether there is one token, few, or more; within each of the first two classes a
    token's result does not depend on the others. New values in the weight must be complete before the kernel ahead of this one starts."""
    n, k = weight.shape
    if not _readable(weight):
        return lambda x: F.linear(x, weight, bias)
    rows = rows_for(n, k)
    few, pays = _few(weight, bias)

    def apply(x: Tensor | Unscaled | Ready) -> Tensor:
        if isinstance(x, Ready):
            return x.values
        if isinstance(x, Unscaled):
            return few(x)
        if not _by_rows(x, weight) or not pays(len(x)):
            return F.linear(x, weight, bias)
        return by_rows(x, weight, bias, rows) if len(x) == 1 else few(x)

    return apply


def pack_gated(weight: Tensor, bias: Tensor | None) -> Function:
    """x [..., K] -> silu(x Wg^T) * (x Wu^T) [..., I] for a weight [2 I, K] of gates, then ups; as pack_linear, rounded as by silu_mul after it."""
    plain = pack_linear(weight, bias)
    if not _readable(weight) or linear_hopper is None or not linear_hopper.takes(weight, gated=True):
        return lambda x: silu_mul(plain(x))
    rows = rows_for(*weight.shape)
    few = linear_hopper.pack(weight, bias, gated=True)
    many = matmul_hopper.pack(weight, bias, gated=True) if bias is None else None

    def apply(x: Tensor | Unscaled) -> Tensor:
        if isinstance(x, Unscaled):
            return few(x)
        if _by_rows(x, weight) and linear_hopper.pays(len(x), weight):
            return by_rows(x, weight, bias, rows, gated=True) if len(x) == 1 else few(x)
        if many is not None and _by_rows(x, weight) and matmul_hopper.pays(len(x), weight):
            return many(x)
        return silu_mul(plain(x))

    return apply


def pack_into_norm(
    weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float, after: Tensor | None
) -> Callable[[Tensor, Tensor], tuple[Tensor | Unscaled, Tensor]] | None:
    """(x [T, K], residual [T, N]) -> (the RMS norm of residual + x W^T + b, that sum), as add_rms_norm of the product; the sum may be written into
    `residual`. Of few tokens, by small weights, the norm is Unscaled, and functions that were packed for the weight `after` finish it. (A large
    weight's first rows are fetched while a norm computes, so that it costs nothing.) None for weights of which there is nothing to gain.

    Rounding: the sum of few tokens as ever, of many once where the reference rounds twice; so is an Unscaled norm."""
    if not _readable(weight):
        return None
    # An unscaled value might be too large for fp16.
    folds = after is not None and weight.dtype == torch.bfloat16 and all(map(_folds, (weight, after)))
    plain, few = pack_linear(weight, bias), linear_hopper.pack(weight, bias) if folds else None

    def apply(x: Tensor, residual: Tensor) -> tuple[Tensor | Unscaled, Tensor]:
        if len(x) > MANY_TOKENS and bias is None and x.dtype == weight.dtype:
            residual.addmm_(x, weight.t())
            return rms_norm(residual, norm, eps), residual
        if few is None or not _by_rows(x, weight) or not 1 < len(x) <= linear_hopper.MORE_TOKENS:
            return add_rms_norm(plain(x), residual, norm, eps)
        squares = torch.empty(len(x), triton.cdiv(len(weight), linear_hopper.ROWS), dtype=torch.float32, device=x.device)
        return Unscaled(few(x, residual, norm, squares), squares, eps), residual

    return apply


def pack_chain(
    o: Tensor, gate_up: Tensor, down: Tensor, qkv: Tensor, qkv_bias: Tensor | None, mid_norm: Tensor, next_norm: Tensor, eps: float
) -> Callable[[Tensor, Tensor], tuple[Ready, Tensor] | None] | None:
    """(x [T, K], residual [T, N]) -> (what qkv's function returns as it is, the sum), from one attention to the next: o, the norm, the gated MLP,
    the next norm and the next qkv; the sum is written into `residual`. It returns None for a number of tokens at which that does not pay,
    pack_chain for such weights. Rounding as by pack_into_norm and Unscaled."""
    if chain_hopper is None or not chain_hopper.takes(o, gate_up, down, qkv):
        return None
    chain = chain_hopper.pack(o, gate_up, down, qkv, qkv_bias, mid_norm, next_norm, eps)

    def apply(x: Tensor, residual: Tensor) -> tuple[Ready, Tensor] | None:
        if not 1 < len(x) <= chain_hopper.MAX_TOKENS:
            return None
        return Ready(chain(x, residual)), residual

    return apply


def pack_linear_fixed(weight: Tensor, bias: Tensor | None) -> Function:
    """As pack_linear, but a token's result has the same bits whatever the number of tokens. RuntimeError for a weight for which there is no
    such product: fp32, odd shapes, other GPUs."""
    return _fixed(weight, bias, False)


def pack_gated_fixed(weight: Tensor, bias: Tensor | None) -> Function:
    """As pack_gated, likewise."""
    if bias is None:
        return _fixed(weight, None, True)
    plain = _fixed(weight, bias, False)
    return lambda x: silu_mul(plain(x))


def _fixed(weight: Tensor, bias: Tensor | None, gated: bool) -> Function:
    """Both kernels sum in ascending order of the inputs, without a split, and which operand is swapped makes no difference."""
    if linear_hopper is None or not linear_hopper.takes(weight, gated):
        kind = f"a weight {list(weight.shape)} of {str(weight.dtype).removeprefix('torch.')}"
        raise RuntimeError(f"no product for {kind} whose sums do not depend on the batch; there is one for bfloat16 and float16 on Hopper GPUs")
    few, most = linear_hopper.pack(weight, bias, gated), linear_hopper.MAX_TOKENS
    many = (
        matmul_hopper.pack(weight, bias, gated) if matmul_hopper.takes(weight, gated) else lambda x: torch.cat([few(part) for part in x.split(most)])
    )

    def apply(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = few(flat) if len(flat) <= most else many(flat)
        return out.view(*x.shape[:-1], -1)

    return apply


def _readable(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous() and weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0


def _takes_hopper(weight: Tensor) -> bool:
    return len(weight) >= MANY_ROWS and linear_hopper is not None and linear_hopper.takes(weight)


def _folds(weight: Tensor) -> bool:
    return _readable(weight) and _takes_hopper(weight) and linear_hopper.small(weight)


def _by_rows(x: Tensor, weight: Tensor) -> bool:
    return x.ndim == 2 and len(x) > 0 and x.dtype == weight.dtype and x.stride(1) == 1


def _few(weight: Tensor, bias: Tensor | None) -> tuple[Function, Callable[[int], bool]]:
    """The product of few tokens, and whether it pays for so many."""
    n, k = weight.shape
    if _takes_hopper(weight):
        return linear_hopper.pack(weight, bias), lambda tokens: linear_hopper.pays(tokens, weight)
    tiles = tiles_for(n, k)
    counters = torch.zeros(triton.cdiv(n, tiles.block_n), dtype=torch.int32, device=weight.device)
    return lambda x: tiled(x, weight, bias, counters, tiles), lambda tokens: tokens <= MAX_TOKENS
