"""Everything between the fused projection and attention in one kernel: split, QK-norm, rotation, and the write into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton import pdl


@triton.jit
def inverse_rms(a, b, eps, HALF: tl.constexpr):
    """1 / rms of heads held as two halves [heads, N], zeros from HALF on. Neighbours are added up pair by pair: a sum whose order is not the
    layout's, so that a head is the same to the bit in every kernel and launch."""
    total = tl.fma(a, a, b * b)
    for _ in tl.static_range(9):  # halves of up to 512
        if total.shape[1] > 1:
            total = tl.sum(tl.reshape(total, [total.shape[0], total.shape[1] // 2, 2]), 2)
    return tl.rsqrt(tl.fma(tl.reshape(total, [total.shape[0]]), 0.5 / HALF, eps))


@triton.jit
def normed(a, scale, weight, dtype: tl.constexpr):
    """As the reference rounds."""
    return ((a * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def rotated(a, b, cos, sin):
    """Both halves, in fp32. Written out to the rounding, which two compilations of a sum of products need not agree on."""
    return tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)


@triton.jit(do_not_specialize=["qkv_stride"])
def _rope_qkv_cache_kernel(
    qkv, cos_sin, positions, q_weight, k_weight, eps, q_out, k_cache, v_cache, slots,
    qkv_stride, page_stride, head_stride, v_page_stride, v_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (t, i): the i-th block of heads of token t, counted over q's blocks, then k's, then v's."""
    if PDL:  # attention may start at once: it has much to fetch that no kernel of this layer writes, before it waits for this one
        tl.extra.cuda.gdc_launch_dependents()
    pdl.begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    half_at = tl.arange(0, BLOCK_HALF)
    half_mask = half_at < HALF

    is_q = block < q_blocks
    is_v = block >= q_blocks + kv_blocks
    heads = tl.arange(0, BLOCK_HEADS) + BLOCK_HEADS * (block - tl.where(is_q, 0, tl.where(is_v, q_blocks + kv_blocks, q_blocks)))
    mask = (heads < tl.where(is_q, NUM_HEADS, NUM_KV_HEADS))[:, None] & half_mask[None, :]
    column = heads + tl.where(is_q, 0, tl.where(is_v, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    source = qkv + token * qkv_stride + column[:, None] * (2 * HALF) + half_at[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)

    if not is_v:
        if NORM:
            weight = k_weight
            if is_q:
                weight = q_weight
            scale = inverse_rms(a, b, eps, HALF)[:, None]
            a = normed(a, scale, tl.load(weight + half_at, mask=half_mask, other=0.0)[None, :], dtype)
            b = normed(b, scale, tl.load(weight + HALF + half_at, mask=half_mask, other=0.0)[None, :], dtype)
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + half_at
        cos = tl.load(angle, mask=half_mask, other=0.0)[None, :]
        sin = tl.load(angle + HALF, mask=half_mask, other=0.0)[None, :]
        a, b = rotated(a, b, cos, sin)

    if is_q:
        target = q_out + (token * NUM_HEADS + heads[:, None]) * (2 * HALF) + half_at[None, :]
        tl.store(target, a, mask=mask)
        tl.store(target + HALF, b, mask=mask)
    else:
        slot = tl.load(slots + token)
        page, offset = (slot // PAGE_SIZE).to(tl.int64), slot % PAGE_SIZE
        # Rounded to qkv's dtype first: the cache's may be narrower.
        if is_v:
            target = v_cache + page * v_page_stride + heads[:, None] * v_head_stride + offset * (2 * HALF) + half_at[None, :]
            tl.store(target, a.to(dtype).to(v_cache.dtype.element_ty), mask=mask)
            tl.store(target + HALF, b.to(dtype).to(v_cache.dtype.element_ty), mask=mask)
        else:
            target = k_cache + page * page_stride + heads[:, None] * head_stride + offset * (2 * HALF) + half_at[None, :]
            tl.store(target, a.to(dtype).to(k_cache.dtype.element_ty), mask=mask)
            tl.store(target + HALF, b.to(dtype).to(k_cache.dtype.element_ty), mask=mask)


def rope_qkv_cache(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos_sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """As the reference. Tokens that share a slot (padding, all in slot 0) leave one of theirs there."""
    dim = cos_sin.shape[-1]
    tokens = qkv.shape[0]
    q = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    assert qkv.stride(1) == 1 and k_cache.stride()[2:] == (dim, 1) and v_cache.stride()[2:] == (dim, 1) and cos_sin.is_contiguous()
    # A block of heads a program: one when there are few tokens to spread over the GPU, more when launches would outnumber the work.
    heads, warps = (1, 1) if tokens <= 32 else (16, 4) if tokens <= 1024 else (8, 1)
    grid = (tokens, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))
    if tokens:
        _rope_qkv_cache_kernel[grid](
            qkv, cos_sin, positions, q_weight, k_weight, eps, q, k_cache, v_cache, slots,
            qkv.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=dim // 2, BLOCK_HALF=triton.next_power_of_2(dim // 2),
            PAGE_SIZE=k_cache.shape[2], BLOCK_HEADS=heads, NORM=q_weight is not None and k_weight is not None, num_warps=warps,
            **pdl.launch_options(tokens),
        )  # fmt: skip
    return q
