"""Programmatic dependent launch: on Hopper and later a kernel's programs may start while the kernel before it is still ending.

One rule keeps it safe, whatever kernels follow each other: a kernel calls `begin` before it reads or writes anything but weights, and
`begin` first waits until the kernel before it is complete and only then lets the next one start. So at any time at most the next kernel
waits at its own `begin`, with nothing done but its start-up and its first weights fetched; everything older is complete.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

FEW_TOKENS = 512  # in steps of more, programs that wait would take the place of those of the large product (cuBLAS's) before them


@triton.jit
def begin(PDL: tl.constexpr):
    """Waits for the kernel before this one, then allows the next to start. Nothing without PDL, where the launch itself waits."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def available() -> bool:
    """Whether the GPU and this build of torch can do it."""
    return not triton.knobs.runtime.interpret and bool(torch.version.cuda) and torch.cuda.get_device_capability() >= (9, 0)


def launch_options(tokens: int) -> dict[str, Any]:
    """Arguments of every launch of a kernel that calls `begin`, by the tokens in its step."""
    return {"PDL": True, "launch_pdl": True} if tokens <= FEW_TOKENS and available() else {"PDL": False}
