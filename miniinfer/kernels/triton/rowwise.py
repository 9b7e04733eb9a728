"""Norms and activations: one read and one write per element, nothing kept between rows.

Rounding follows the reference to the letter: a normed value is rounded to the input's dtype before it meets the weight, a silu before
it meets `up`. A product of two bf16 or fp16 numbers is exact in fp32, so taking it there and rounding once equals taking it in the dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniinfer.kernels.triton import pdl


@triton.jit
def norm_row(value, weight, cols, mask, size, eps, dtype: tl.constexpr):
    """The RMS norm of `size` numbers [BLOCK] fp32, with zeros behind them; fp32, to be rounded to `dtype`."""
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    normed = (value * scale).to(dtype).to(tl.float32)
    return normed * tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["x_stride"])
def _rms_norm_kernel(x, residual, weight, out, x_stride, size, eps, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr):
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    value = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * size + cols, mask=mask, other=0.0).to(tl.float32)
        value = value.to(residual.dtype.element_ty)
        tl.store(residual + row * size + cols, value, mask=mask)
        value = value.to(tl.float32)
    tl.store(out + row * size + cols, norm_row(value, weight, cols, mask, size, eps, x.dtype.element_ty), mask=mask)


def norm_tile(size: int) -> dict[str, int]:
    """Block and warps of a kernel that norms rows of `size` numbers: norm_row sums in the same order in all that take these."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _norm_launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size) if x.stride(-1) == 1 else x.contiguous().view(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, residual, weight, out, rows.stride(0), size, eps,
            ADD=residual is not None, **norm_tile(size), **pdl.launch_options(len(rows)),
        )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference; one program a row."""
    return _norm_launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference; the sum is written into `residual`, which must be contiguous and is the second result."""
    assert residual.is_contiguous()
    return _norm_launch(x, residual, weight, eps), residual


@triton.jit
def _silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    gate = tl.load(gate_up + row * 2 * size + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + cols, mask=mask, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + cols, activated * up, mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the reference, for any leading shape."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // size
    block = min(triton.next_power_of_2(size), 1024)
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4, **pdl.launch_options(rows))
    return out
