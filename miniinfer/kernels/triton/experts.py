"""Mixture of experts: routing, the launch of the products, and the weighted sum.

Up to FEW tokens go through their experts one by one, in two launches that read the weights by rows. For more, every expert lists its (token,
choice) pairs, and the products run over those lists without a gathered copy: on Hopper in experts_hopper.py, elsewhere here. The down
product leaves each pair's part, and a last kernel sums a token's parts by weight, in the order of choice, and takes the norm behind the
experts if there is one. No place in a list and no order of sums is left to chance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton import pdl
from miniinfer.kernels.triton.rowwise import add_rms_norm, norm_row, norm_tile

try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from miniinfer.kernels.triton.experts_hopper import expert_hopper_kernel
    from miniinfer.kernels.triton.matmul_hopper import multiprocessors

    MATRIX = NVMMASharedLayout(128, 16, 2)
except ImportError:  # Gluon is experimental and may move
    expert_hopper_kernel = None

FEW = 2  # tokens at most that go through their experts one by one, if they are unlikely to share one

# ------------------------------------------------------------------------------------------------------------- routing


@triton.jit
def _choose(logits, token, logits_stride, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """For tokens [R], by as many warps: (their experts' weights, each expert's rank or TOP_K if it is not chosen), both [R, BLOCK_E]."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    value = tl.load(logits + token.to(tl.int64)[:, None] * logits_stride + experts, mask=experts < EXPERTS, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 1)[:, None])
    chance = value / tl.sum(value, 1)[:, None]
    # The bits of numbers from 0 on order as they do, and the GPU has an instruction for a warp's greatest integer. NaN must not lead
    # out of bounds.
    key = tl.where(experts < EXPERTS, tl.where(chance >= 0, chance, 0.0).to(tl.int32, bitcast=True), -1)
    rank = tl.where(key >= -1, TOP_K, 0)
    for j in tl.static_range(TOP_K):
        best = tl.min(tl.where(key == tl.max(key, 1)[:, None], experts, BLOCK_E), 1)[:, None]  # ties to the lower
        rank = tl.where(experts == best, j, rank)
        key = tl.where(experts == best, -1, key)
    if RENORMALIZE:
        chance = chance / tl.sum(tl.where(rank < TOP_K, chance, 0.0), 1)[:, None]
    return chance, rank


@triton.jit(do_not_specialize=["tokens"])
def _choose_kernel(
    logits, weights, chosen, tokens, logits_stride,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program i: the experts of BLOCK_T tokens, likeliest first: chosen [T, K] int16 and their weights [T, K] fp32."""
    pdl.begin(PDL)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    chance, rank = _choose(logits, tl.minimum(token, tokens - 1), logits_stride, EXPERTS, BLOCK_E, TOP_K, RENORMALIZE)
    mask = (rank < TOP_K) & (token < tokens)[:, None]
    tl.store(weights + token[:, None] * TOP_K + rank, chance, mask=mask)
    tl.store(chosen + token[:, None] * TOP_K + rank, (tl.arange(0, BLOCK_E)[None, :] + 0 * rank).to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def _list_kernel(chosen, order, offsets, tickets, pairs, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program e: expert e's pairs into order [pairs] in ascending order, from offsets[e] on; the last also writes offsets[E], and the
    first clears the tickets of the products. `chosen` is as long as whole blocks, so that it can be read without a mask: 16 bytes at once."""
    pdl.begin(PDL)
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]  # 8 to a thread
    before = tl.zeros([BLOCK // 8, 8], tl.int32)
    for start in range(0, pairs, BLOCK):
        before += ((tl.load(chosen + start + offs) < expert) & (start + offs < pairs)).to(tl.int32)
    begin = tl.sum(tl.sum(before, 1), 0)
    end = begin
    for start in range(0, pairs, BLOCK):
        mine = ((tl.load(chosen + start + offs) == expert) & (start + offs < pairs)).to(tl.int32)
        count = tl.sum(mine, 1)
        place = end + (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(mine, 1) - 1
        tl.store(order + place, start + offs, mask=mine > 0)
        end += tl.sum(count, 0)
    tl.store(offsets + expert, begin)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets + expert + 1, end)
    if expert == 0:
        tl.store(tickets + tl.arange(0, 2), tl.zeros([2], tl.int32))


# ---------------------------------------------------------------------------------------------------------- few tokens


@triton.jit
def _few_gate_up_kernel(
    x, chosen, w13, out, x_stride,
    TOP_K: tl.constexpr, SIZE_N: tl.constexpr, SIZE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j, t): rows i * BLOCK_N ... of silu(gate) * up of token t's j-th expert. Each row's next block is on its way while one is
    multiplied."""
    pdl.begin(PDL)
    token = tl.program_id(2)
    pair = token * TOP_K + tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_K)
    expert = tl.load(chosen + pair).to(tl.int64)
    gate_at = w13 + (expert * (2 * SIZE_N) + tl.minimum(rows, SIZE_N - 1))[:, None] * SIZE_K + offs[None, :]
    up_at = gate_at + SIZE_N * SIZE_K
    within = (offs < SIZE_K)[None, :]
    gate_block = tl.load(gate_at, mask=within, other=0.0, eviction_policy="evict_first")
    up_block = tl.load(up_at, mask=within, other=0.0, eviction_policy="evict_first")
    gate = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)  # the 8 inputs of a 16-byte load are summed in their thread
    up = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    for k in range(0, SIZE_K, BLOCK_K):
        values = tl.load(x + token * x_stride + k + offs, mask=k + offs < SIZE_K, other=0.0).to(tl.float32)[None, :]
        gates = gate_block.to(tl.float32) * values
        ups = up_block.to(tl.float32) * values
        if SIZE_K > BLOCK_K:
            within = (k + BLOCK_K + offs < SIZE_K)[None, :]
            gate_block = tl.load(gate_at + k + BLOCK_K, mask=within, other=0.0, eviction_policy="evict_first")
            up_block = tl.load(up_at + k + BLOCK_K, mask=within, other=0.0, eviction_policy="evict_first")
        gate += tl.sum(tl.reshape(gates, [BLOCK_N, BLOCK_K // 8, 8]), 2)
        up += tl.sum(tl.reshape(ups, [BLOCK_N, BLOCK_K // 8, 8]), 2)
    dtype: tl.constexpr = out.dtype.element_ty
    result = tl.sum(gate, 1).to(dtype).to(tl.float32)
    result = (result * tl.sigmoid(result)).to(dtype).to(tl.float32) * tl.sum(up, 1).to(dtype).to(tl.float32)
    tl.store(out + pair * SIZE_N + rows, result, mask=rows < SIZE_N)


@triton.jit
def _few_down_kernel(
    x, chosen, weights, w2, out, TOP_K: tl.constexpr, BLOCK_C: tl.constexpr,
    SIZE_N: tl.constexpr, SIZE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, t): outputs i * BLOCK_N ... of token t, all its experts at once, each one's part rounded before it is weighted."""
    pdl.begin(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    offs = tl.arange(0, BLOCK_K)
    choices = tl.arange(0, BLOCK_C)
    real = choices < TOP_K
    expert = tl.load(chosen + token * TOP_K + choices, mask=real, other=0).to(tl.int64)
    source = w2 + (expert[:, None] * SIZE_N + tl.minimum(rows, SIZE_N - 1)[None, :])[:, :, None] * SIZE_K + offs[None, None, :]
    inputs = x + (token * TOP_K + choices)[:, None] * SIZE_K + offs[None, :]
    block = tl.load(source, mask=real[:, None, None] & (offs < SIZE_K)[None, None, :], other=0.0, eviction_policy="evict_first")
    sums = tl.zeros([BLOCK_C, BLOCK_N, BLOCK_K // 8], tl.float32)
    for k in range(0, SIZE_K, BLOCK_K):
        values = tl.load(inputs + k, mask=real[:, None] & (k + offs < SIZE_K)[None, :], other=0.0).to(tl.float32)
        products = block.to(tl.float32) * values[:, None, :]
        if SIZE_K > BLOCK_K:
            within = real[:, None, None] & (k + BLOCK_K + offs < SIZE_K)[None, None, :]
            block = tl.load(source + k + BLOCK_K, mask=within, other=0.0, eviction_policy="evict_first")
        sums += tl.sum(tl.reshape(products, [BLOCK_C, BLOCK_N, BLOCK_K // 8, 8]), 3)
    parts = tl.sum(sums, 2).to(out.dtype.element_ty).to(tl.float32)
    share = tl.load(weights + token * TOP_K + choices, mask=real, other=0.0)
    tl.store(out + token * SIZE_N + rows, tl.sum(parts * share[:, None], 0), mask=rows < SIZE_N)


# ------------------------------------------------------------------------------------------------------------ products


@triton.jit
def _expert_kernel(
    x, weight, out, order, offsets, x_stride,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, SIZE_N: tl.constexpr, SIZE_K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (n, i): columns n of the i-th row tile over the experts' lists, as expert_hopper_kernel computes them. GATED: weight
    [E, 2 N, K] holds gate rows, then up rows, and the result is silu(gate) * up, rounded as the reference rounds."""
    pdl.begin(PDL)
    experts = tl.arange(0, BLOCK_E)
    begins = tl.load(offsets + experts, mask=experts < EXPERTS, other=0)
    sizes = tl.load(offsets + experts + 1, mask=experts < EXPERTS, other=0) - begins
    ends = tl.cumsum((sizes + BLOCK_M - 1) // BLOCK_M, 0)
    index = tl.program_id(1)
    expert = tl.sum((ends <= index).to(tl.int32), 0)
    if expert >= EXPERTS:  # past the last tile
        return
    offs_m = (index - tl.max(tl.where(experts < expert, ends, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = offs_m < tl.sum(tl.where(experts == expert, sizes, 0), 0)
    place = tl.sum(tl.where(experts == expert, begins, 0), 0) + offs_m
    pair = tl.load(order + place, mask=live, other=0)
    source = pair // TOP_K if GATED else tl.where(live, place, 0)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = (1 + GATED) * SIZE_N
    x_at = x + source.to(tl.int64)[:, None] * x_stride + offs_k[None, :]
    w_at = weight + (expert.to(tl.int64) * rows + offs_n % SIZE_N)[:, None] * SIZE_K + offs_k[None, :]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, SIZE_K, BLOCK_K):
        if SIZE_K % BLOCK_K == 0:
            a = tl.load(x_at + k)
            b = tl.load(w_at + k)
        else:
            within = (k + offs_k < SIZE_K)[None, :]
            a = tl.load(x_at + k, mask=within, other=0.0)
            b = tl.load(w_at + k, mask=within, other=0.0)
        gate = tl.dot(a, tl.trans(b), gate, input_precision="ieee")
        if GATED:
            if SIZE_K % BLOCK_K == 0:
                c = tl.load(w_at + SIZE_N * SIZE_K + k)
            else:
                c = tl.load(w_at + SIZE_N * SIZE_K + k, mask=(k + offs_k < SIZE_K)[None, :], other=0.0)
            up = tl.dot(a, tl.trans(c), up, input_precision="ieee")
    if GATED:
        dtype: tl.constexpr = x.dtype.element_ty
        gate = gate.to(dtype).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    target = out + (place if GATED else pair).to(tl.int64)[:, None] * SIZE_N + offs_n[None, :]
    tl.store(target, gate.to(out.dtype.element_ty), mask=live[:, None] & (offs_n < SIZE_N)[None, :])


@triton.jit
def _sum_kernel(parts, weights, residual, norm, out, size, eps, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (t, i): a block of columns of out[t] = sum over j of weights[t, j] * parts[t * K + j], in fp32, in the order of j.
    With a residual, a whole row: the sum is added to it in place, and out is the RMS norm of that, all rounded as add_rms_norm does."""
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + j) * size + cols, mask=cols < size, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + token * TOP_K + j)
    dtype: tl.constexpr = out.dtype.element_ty
    if residual is not None:
        acc = acc.to(dtype).to(tl.float32) + tl.load(residual + token * size + cols, mask=cols < size, other=0.0).to(tl.float32)
        total = acc.to(dtype)
        tl.store(residual + token * size + cols, total, mask=cols < size)
        acc = norm_row(total.to(tl.float32), norm, cols, cols < size, size, eps, dtype)
    tl.store(out + token * size + cols, acc.to(dtype), mask=cols < size)


# -------------------------------------------------------------------------------------------------------------- launch


def expert_tiles(rows: float, element_size: int, gated: bool) -> dict[str, int]:
    """Tile sizes and launch options of _expert_kernel for experts of `rows` rows on average. fp32 products run without tensor cores: small
    tiles."""
    if element_size == 4:
        sizes = (16, 32, 32, 4, 2) if rows <= 16 else (32, 32, 32, 4, 2)
    elif rows <= 16:
        sizes = (16, 32 if gated else 64, 128, 4, 4)
    elif rows <= 64:
        sizes = (64, 64 if gated else 128, 64, 4, 4)
    else:
        sizes = (128, 64 if gated else 128, 64, 8, 4)
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), sizes, strict=True))


def hopper_tiles(pairs: int, experts: int, tiles: int, gated: bool, programs: int) -> dict[str, int]:
    """The same of expert_hopper_kernel, where an expert has `tiles` tiles of 256 rows of weights: deep ones where experts have many pairs,
    else such as read the weights best: narrow ones of gates, and where there would be too few. The ring of blocks fills shared memory."""
    if pairs > 48 * experts:
        return {"GROUPS": 2, "BLOCK_N": 256, "STAGES": 4, "REGISTERS": 72, "maxnreg": 168}
    if gated or 2 * pairs * tiles < programs:
        return {"GROUPS": 1, "BLOCK_N": 128, "STAGES": 8, "REGISTERS": 80, "maxnreg": 160}
    return {"GROUPS": 1, "BLOCK_N": 256, "STAGES": 5, "REGISTERS": 80, "maxnreg": 160}


def _takes_hopper(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether expert_hopper_kernel takes these. Its copies are of 16 bytes, and Triton must know a row's address to be a multiple of them."""
    if expert_hopper_kernel is None or not x.is_cuda or x.element_size() != 2 or len(w2) > 512:
        return False
    aligned = w13.shape[2] % 8 == 0 and w2.shape[2] % 8 == 0 and x.stride(0) % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (x, w13, w2))
    return aligned and multiprocessors(x.device) > 0


def moe(x: Tensor, router_logits: Tensor, w13: Tensor, w2: Tensor, top_k: int, renormalize: bool, few: int = FEW) -> Tensor:
    """As the reference; each expert's contribution is rounded to x's dtype, as a linear layer's result is, before the fp32 sum.

    A token's result does not depend on the others, but on how many there are: of up to `few` the sums may be taken in another order. With
    few = 0 it depends on nothing else."""
    if not len(x):
        return torch.empty_like(x)
    weights, chosen = _choose_experts(router_logits, top_k, renormalize)
    if _one_by_one(len(x), top_k, len(w2), few):
        return _few(x, weights, chosen, w13, w2, top_k)
    parts, out = _parts(x, chosen, w13, w2, top_k), torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x.shape[1]
    block = min(triton.next_power_of_2(size), 1024)
    grid = (len(x), triton.cdiv(size, block))
    _sum_kernel[grid](parts, weights, None, None, out, size, 0.0, TOP_K=top_k, BLOCK=block, num_warps=4, **_options(len(x)))
    return out


def moe_into_norm(
    x: Tensor, router_logits: Tensor, w13: Tensor, w2: Tensor, top_k: int, renormalize: bool,
    residual: Tensor, norm: Tensor, eps: float, few: int = FEW,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """add_rms_norm(moe(...), residual, norm, eps), to the bit."""
    assert residual.is_contiguous()
    if not len(x):
        return torch.empty_like(x), residual
    weights, chosen = _choose_experts(router_logits, top_k, renormalize)
    if _one_by_one(len(x), top_k, len(w2), few):
        return add_rms_norm(_few(x, weights, chosen, w13, w2, top_k), residual, norm, eps)
    parts, out = _parts(x, chosen, w13, w2, top_k), torch.empty_like(residual)
    size = x.shape[1]
    _sum_kernel[(len(x),)](parts, weights, residual, norm, out, size, eps, TOP_K=top_k, **norm_tile(size), **_options(len(x)))
    return out, residual


def _options(tokens: int) -> dict[str, bool]:
    """Of all launches but the first: what comes before is ours, and no large product."""
    return pdl.launch_options(min(tokens, pdl.FEW_TOKENS))


def _one_by_one(tokens: int, top_k: int, experts: int, few: int) -> bool:
    return tokens <= few and (tokens == 1 or 4 * tokens * top_k <= experts)


def _choose_experts(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """What _choose_kernel writes; there is room for whole blocks of _list_kernel behind what is chosen."""
    assert router_logits.stride(1) == 1
    tokens, experts = router_logits.shape
    pairs, at_once = tokens * top_k, 1 if tokens <= 64 else 4
    weights = torch.empty(pairs, dtype=torch.float32, device=router_logits.device)
    chosen = torch.empty(triton.cdiv(pairs, _list_block(pairs)) * _list_block(pairs), dtype=torch.int16, device=router_logits.device)
    _choose_kernel[(triton.cdiv(tokens, at_once),)](
        router_logits, weights, chosen, tokens, router_logits.stride(0), EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_T=at_once, TOP_K=top_k, RENORMALIZE=renormalize, num_warps=at_once, **pdl.launch_options(tokens),
    )  # fmt: skip
    return weights, chosen


def _list_block(pairs: int) -> int:
    return min(8192, max(256, triton.next_power_of_2(pairs)))


def _few(x: Tensor, weights: Tensor, chosen: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """The tokens' results [T, hidden], one by one."""
    tokens, (_, hidden, inner), options = len(x), w2.shape, _options(len(x))
    assert x.stride(1) == 1 and w13.is_contiguous() and w2.is_contiguous()
    active = torch.empty(tokens * top_k, inner, dtype=x.dtype, device=x.device)
    _few_gate_up_kernel[(triton.cdiv(inner, 2), top_k, tokens)](
        x, chosen, w13, active, x.stride(0), TOP_K=top_k,
        SIZE_N=inner, SIZE_K=hidden, BLOCK_N=2, BLOCK_K=min(2048, triton.next_power_of_2(hidden)), num_warps=4, **options,
    )  # fmt: skip
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    choices = triton.next_power_of_2(top_k)
    _few_down_kernel[(triton.cdiv(hidden, 2), tokens)](
        active, chosen, weights, w2, out, TOP_K=top_k, BLOCK_C=choices,
        SIZE_N=hidden, SIZE_K=inner, BLOCK_N=2, BLOCK_K=max(16, 2048 // choices), num_warps=8, **options,
    )  # fmt: skip
    return out


def _parts(x: Tensor, chosen: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """Each pair's part of its token's result, [T * K, hidden], by the experts' lists."""
    tokens, (experts, hidden, inner), options = len(x), w2.shape, _options(len(x))
    assert x.stride(1) == 1 and w13.is_contiguous() and w2.is_contiguous()
    pairs, block = tokens * top_k, _list_block(tokens * top_k)
    active = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=x.device)
    tickets = torch.empty(2, dtype=torch.int32, device=x.device)
    _list_kernel[(experts,)](chosen, order, offsets, tickets, pairs, BLOCK=block, num_warps=block // 256, **options)
    parts = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    product = _product_hopper if _takes_hopper(x, w13, w2) else _product
    product(x, w13, active, order, offsets, tickets[:1], top_k, True, options)
    product(active, w2, parts, order, offsets, tickets[1:], top_k, False, options)
    return parts


def _product_hopper(
    x: Tensor, weight: Tensor, out: Tensor, order: Tensor, offsets: Tensor, ticket: Tensor, top_k: int, gated: bool, options: dict[str, bool]
) -> None:
    (experts, rows, size_k), (pairs, size_n) = weight.shape, out.shape
    programs = multiprocessors(x.device)
    tiles = hopper_tiles(pairs, experts, triton.cdiv(rows, 256), gated, programs)
    weights = TensorDescriptor(weight, [experts * rows, size_k], [size_k, 1], [tiles["BLOCK_N"] // 2, 64], MATRIX)
    inputs = None if gated else TensorDescriptor(x, [pairs, size_k], [size_k, 1], [64, 64], MATRIX)
    expert_hopper_kernel[(programs,)](
        x, inputs, weights, out, order, offsets, ticket, x.stride(0),
        EXPERTS=experts, SIZE_N=size_n, SIZE_K=size_k, TOP_K=top_k, GATED=gated, **tiles, num_warps=4, PDL=options["PDL"],
        **({"launch_pdl": True} if options["PDL"] else {}),
    )  # fmt: skip


def _product(
    x: Tensor, weight: Tensor, out: Tensor, order: Tensor, offsets: Tensor, ticket: Tensor, top_k: int, gated: bool, options: dict[str, bool]
) -> None:
    experts, (pairs, size_n) = len(weight), out.shape
    tiles = expert_tiles(pairs / experts, x.element_size(), gated)
    grid = (triton.cdiv(size_n, tiles["BLOCK_N"]), pairs // tiles["BLOCK_M"] + min(experts, pairs))  # each expert wastes less than a tile
    _expert_kernel[grid](
        x, weight, out, order, offsets, x.stride(0),
        EXPERTS=experts, BLOCK_E=triton.next_power_of_2(experts), SIZE_N=size_n, SIZE_K=weight.shape[2], TOP_K=top_k, GATED=gated,
        **tiles, **options,
    )  # fmt: skip
