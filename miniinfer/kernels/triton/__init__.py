"""Triton overlays of the reference ops (GPU).

Owns the list of what is overlaid; meaning, shapes and dtypes of each op stand in kernels/reference.py. No op waits for the device or
allocates by its data, so every one can be captured into a CUDA graph. `rope_qkv` stays with the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton

from miniinfer.kernels.triton.attention_launch import attention, paged_attention, rope_paged_attention
from miniinfer.kernels.triton.experts import moe, moe_into_norm
from miniinfer.kernels.triton.linear import pack_chain, pack_gated, pack_gated_fixed, pack_into_norm, pack_linear, pack_linear_fixed
from miniinfer.kernels.triton.rope import rope_qkv_cache
from miniinfer.kernels.triton.rowwise import add_rms_norm, rms_norm, silu_mul
from miniinfer.kernels.triton.sampling import apply_bitmask, apply_penalties, sample_rows
from miniinfer.kernels.triton.steps import copy_pages, deliver, stage, step_inputs

__all__ = [
    "add_rms_norm", "apply_bitmask", "apply_penalties", "attention", "copy_pages", "deliver", "fixed_order", "load", "moe", "moe_into_norm",
    "pack_chain", "pack_gated", "pack_into_norm", "pack_linear", "paged_attention", "rms_norm", "rope_paged_attention", "rope_qkv_cache",
    "sample_rows", "silu_mul", "stage", "step_inputs",
]  # fmt: skip


def load() -> None:
    """Raises RuntimeError where the kernels cannot run: no GPU (and no interpreter), or one older than Ampere."""
    if triton.knobs.runtime.interpret:
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which bfloat16 products need")


def fixed_order() -> dict[str, Any]:
    """The operations whose sums could otherwise depend on the other tokens of a step, in the form where they do not (`--deterministic`)."""
    experts = {f.__name__: partial(f, few=0) for f in (moe, moe_into_norm)}
    return {"pack_linear": pack_linear_fixed, "pack_gated": pack_gated_fixed, "pack_into_norm": None, "pack_chain": None, **experts}
