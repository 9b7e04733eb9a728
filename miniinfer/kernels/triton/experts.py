"""Mixture of experts in four launches: route, gate-up product with SiLU, down product, weighted sum.

Routing writes, for every expert, the list of (token, choice) pairs that chose it; each product tile finds its expert and rows from the
lists' lengths alone, so there is no sort, no gathered copy and no wait for the host. A pair's place in its list is left to chance (an
atomic counter) but does not enter its numbers, and a token's experts are summed in a fixed order: results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    logits, weights, counts, lists, tokens, logits_stride,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Program t: token t's experts, likeliest first. Writes weights [T, K] fp32 and enters pair t * K + rank into lists [E, T]."""
    token = tl.program_id(0)
    offs = tl.arange(0, BLOCK_E)
    value = tl.load(logits + token.to(tl.int64) * logits_stride + offs, mask=offs < EXPERTS, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    probs = value / tl.sum(value, 0)
    rank = tl.full([BLOCK_E], TOP_K, tl.int32)  # TOP_K: not chosen
    for j in tl.static_range(TOP_K):
        free = tl.where((rank == TOP_K) & (offs < EXPERTS), probs, -1.0)
        best = tl.minimum(tl.argmax(free, 0), EXPERTS - 1)  # ties to the lower index; NaN must not lead out of bounds
        rank = tl.where(offs == best, j, rank)
    chosen = rank < TOP_K
    if RENORMALIZE:
        probs = probs / tl.sum(tl.where(chosen, probs, 0.0), 0)
    pair = token * TOP_K + rank
    tl.store(weights + pair, probs, mask=chosen)
    place = tl.atomic_add(counts + offs, 1, mask=chosen, sem="relaxed")
    tl.store(lists + offs.to(tl.int64) * tokens + place, pair, mask=chosen)


@triton.jit(do_not_specialize=["tokens"])
def _expert_kernel(
    x, weight, out, counts, lists, tokens, x_stride,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, SIZE_N: tl.constexpr, SIZE_K: tl.constexpr, SHARE: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (n, i): columns n of the i-th row tile, counted over the experts' lists: out[pair] = x[pair // SHARE] @ weight[expert].T.

    GATED: weight [E, 2 N, K] holds gate rows, then up rows, and the result is silu(gate) * up, rounded as the reference rounds."""
    experts = tl.arange(0, BLOCK_E)
    sizes = tl.load(counts + experts, mask=experts < EXPERTS, other=0)
    ends = tl.cumsum((sizes + BLOCK_M - 1) // BLOCK_M, 0)
    index = tl.program_id(1)
    expert = tl.sum((ends <= index).to(tl.int32), 0)
    size = tl.sum(tl.where(experts == expert, sizes, 0), 0)
    start = (index - tl.max(tl.where(experts < expert, ends, 0), 0)) * BLOCK_M
    if start >= size:  # past the last tile
        return

    offs_m = start + tl.arange(0, BLOCK_M)
    pair = tl.load(lists + expert.to(tl.int64) * tokens + offs_m, mask=offs_m < size, other=0)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = (1 + GATED) * SIZE_N
    x_at = x + (pair // SHARE).to(tl.int64)[:, None] * x_stride + offs_k[None, :]
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
    target = out + pair.to(tl.int64)[:, None] * SIZE_N + offs_n[None, :]
    tl.store(target, gate.to(out.dtype.element_ty), mask=(offs_m < size)[:, None] & (offs_n < SIZE_N)[None, :])


@triton.jit
def _sum_kernel(parts, weights, out, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, i): a block of columns of out[t] = sum over j of weights[t, j] * parts[t * K + j], in fp32, in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + j) * size + cols, mask=cols < size, other=0.0).to(tl.float32)
        acc += part * tl.load(weights + token * TOP_K + j)
    tl.store(out + token * size + cols, acc.to(out.dtype.element_ty), mask=cols < size)


def expert_tiles(rows: float, element_size: int, gated: bool) -> dict[str, int]:
    """Tile sizes and launch options for experts of `rows` rows on average. fp32 products run without tensor cores: small tiles."""
    if element_size == 4:
        sizes = (16, 32, 32, 4, 2) if rows <= 16 else (32, 32, 32, 4, 2)
    elif rows <= 16:
        sizes = (16, 32 if gated else 64, 128, 4, 4)
    elif rows <= 64:
        sizes = (64, 64 if gated else 128, 64, 4, 4)
    else:
        sizes = (128, 64 if gated else 128, 64, 8, 4)
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), sizes, strict=True))


def moe(x: Tensor, router_logits: Tensor, w13: Tensor, w2: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """As the reference; each expert's contribution is rounded to x's dtype, as a linear layer's result is, before the fp32 sum."""
    tokens, hidden = x.shape
    experts, inner = w2.shape[0], w2.shape[2]
    assert x.stride(1) == 1 and router_logits.stride(1) == 1 and w13.is_contiguous() and w2.is_contiguous()
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    pairs, block_e = tokens * top_k, triton.next_power_of_2(experts)
    weights = torch.empty(pairs, dtype=torch.float32, device=x.device)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    lists = torch.empty(experts, tokens, dtype=torch.int32, device=x.device)
    _route_kernel[(tokens,)](
        router_logits, weights, counts, lists, tokens, router_logits.stride(0),
        EXPERTS=experts, BLOCK_E=block_e, TOP_K=top_k, RENORMALIZE=renormalize, num_warps=1,
    )  # fmt: skip

    def product(source: Tensor, weight: Tensor, width: int, share: int, gated: bool) -> Tensor:
        result = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
        tiles = expert_tiles(pairs / experts, x.element_size(), gated)
        # Every expert that was chosen wastes less than one tile.
        grid = (triton.cdiv(width, tiles["BLOCK_N"]), pairs // tiles["BLOCK_M"] + min(experts, pairs))
        _expert_kernel[grid](
            source, weight, result, counts, lists, tokens, source.stride(0),
            EXPERTS=experts, BLOCK_E=block_e, SIZE_N=width, SIZE_K=source.shape[1], SHARE=share, GATED=gated, **tiles,
        )  # fmt: skip
        return result

    parts = product(product(x, w13, inner, top_k, True), w2, hidden, 1, False)
    block = min(triton.next_power_of_2(hidden), 1024)
    _sum_kernel[(tokens, triton.cdiv(hidden, block))](parts, weights, out, hidden, TOP_K=top_k, BLOCK=block, num_warps=4)
    return out
