"""Launches of the attention kernels that are written for Hopper: which shapes they take, tensor maps, counters, scratch memory.

Owns what a launch costs the host: tensor maps and compiled kernels are looked up by shape, not made anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from miniinfer.kernels.triton.decode_hopper import decode_hopper_kernel
from miniinfer.kernels.triton.matmul_hopper import multiprocessors
from miniinfer.kernels.triton.prefill_hopper import prefill_hopper_kernel

LOG2E = 1.4426950408889634
PAGE_SIZE = 64
CHUNK = 3  # pages of one chunk of a decoded sequence; of a longer one all chunks grow, so that there are
CHUNKS = 33  # at most these,
CHUNKS_TIMES_HEADS = 264  # and these over all kv heads: enough to fill a GPU with one sequence
PROGRAMS = 2  # of the decode kernel on a multiprocessor
RING_BYTES = 49_152  # of a program's pages on their way: more were no faster, and slower on mixed lengths


def takes(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the prefill kernel can have these: by the model's shape and the GPU alone."""
    return q.is_contiguous() and _fits(q, k_cache, v_cache)


def takes_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the decode kernel can, likewise. Its q may have tokens' rows apart, as they are in qkv."""
    return q.shape[1] // k_cache.shape[1] <= 16 and q.stride(0) % q.shape[2] == 0 and _fits(q, k_cache, v_cache)


def _fits(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    heads, size, dim = k_cache.shape[1:]
    fits = dim in (64, 128) and size == PAGE_SIZE and q.shape[1] // heads <= 64 and q.element_size() == 2
    if not fits or not q.is_cuda or k_cache.dtype != q.dtype or q.stride()[1:] != (dim, 1):
        return False
    return k_cache.is_contiguous() and v_cache.is_contiguous() and multiprocessors(q.device) > 0


@dataclass(frozen=True, slots=True)
class _Memory:
    """Stands in for a tensor in a TensorDescriptor, which asks for no more and would keep a tensor alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _tensor_map(address: int, dtype: torch.dtype, shape: tuple[int, ...], box: tuple[int, ...]) -> TensorDescriptor:
    """Of contiguous memory, in swizzled boxes."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(_Memory(address, dtype), list(shape), strides, list(box), NVMMASharedLayout(128, 16, len(shape)))


def _cache_maps(k_cache: Tensor, v_cache: Tensor) -> list[TensorDescriptor]:
    pages, heads, size, dim = k_cache.shape
    return [_tensor_map(x.data_ptr(), x.dtype, (pages * heads * size, dim), (size, 64)) for x in (k_cache, v_cache)]


_compiled: dict[Any, Any] = {}


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], shape: tuple[Any, ...], key: tuple[Any, ...], **options: Any) -> None:
    """kernel[programs](*arguments, *shape, **options), with Triton's search for the compiled kernel only at the first launch with this
    shape, key and options. `key` has all that the kernel is specialized on in its arguments."""
    key = (kernel, torch.cuda.current_device(), shape, key, *options.values())
    compiled = _compiled.get(key)
    if compiled is not None and JITFunction.run.__module__ == JITFunction.__module__:  # else rehearsal.py has put its own in its place
        compiled[(programs, 1, 1)](*arguments, *shape)
        return
    compiled = kernel[(programs,)](*arguments, *shape, **options)
    if isinstance(compiled, CompiledKernel):
        _compiled[key] = compiled


_counters: dict[tuple[torch.device, int | None, int], Tensor] = {}


def _zeros(device: torch.device, size: int) -> Tensor:
    """Counters of a kernel that leaves them at zero: some for each stream, since launches on different streams may overlap and must not share
    them, and some for graphs, which replay one after the other."""
    capturing = torch.cuda.is_current_stream_capturing()
    stream = None if capturing else torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device, stream, size))
    if found is None:
        found = torch.zeros(size, dtype=torch.int32, device=device)  # in a capture without a run ahead of it: cleared by every replay
        if not capturing:
            _counters[device, stream, size] = found
            _counters.setdefault((device, None, size), torch.zeros_like(found))
    return found


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, skip_single: bool,
) -> None:  # fmt: skip
    tokens, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    tiles = tokens // (64 // group * 2) + len(rows)
    copy_q = group & (group - 1) == 0  # a box's sides are powers of two
    queries = _tensor_map(q.data_ptr(), q.dtype, tuple(q.shape), (64 // group, group, 64)) if copy_q else None
    arguments = (
        q, queries, *_cache_maps(k_cache, v_cache), out, _zeros(q.device, 2), page_table, rows, query_start, lengths, len(rows), tokens, tiles,
        kv_heads, scale * LOG2E, q.stride(0), page_table.stride(0),
    )  # fmt: skip
    shape = (group, dim, skip_single, copy_q)
    programs = min(tiles * kv_heads, multiprocessors(q.device))
    _launch(prefill_hopper_kernel, programs, arguments, shape, (kv_heads, q.dtype), num_warps=4, maxnreg=168)


class Rope(NamedTuple):
    """What decode needs to do rope_qkv_cache's work as well."""

    cos_sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    slots: Tensor


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_length: int, rope: Rope | None = None,
) -> None:  # fmt: skip
    """With `rope`, q is the first heads of qkv [tokens, heads + 2 * kv_heads, dim]: rope_qkv_cache and attention in one.

    The cache, tables and lengths must be complete before the kernel ahead starts, and the one ahead of that if it is rope_qkv_cache, which lets
    this one start at once; except for each sequence's last key and value."""
    tokens, heads, dim = q.shape
    kv_heads, sequences = k_cache.shape[1], len(rows)
    group, pairs = heads // kv_heads, sequences * kv_heads
    limit = max(4, min(CHUNKS, CHUNKS_TIMES_HEADS // kv_heads))
    pages = triton.cdiv(min(max_length, window or max_length), PAGE_SIZE) + 1  # + 1: a window may begin inside a page
    slots = min(limit, triton.cdiv(pages, CHUNK))
    scratch = torch.empty(pairs * slots * group * (dim + 2), dtype=torch.float32, device=q.device)
    partial, tops, totals = scratch.split([pairs * slots * group * n for n in (dim, 1, 1)])
    counters = _zeros(q.device, triton.next_power_of_2(2 + pairs))
    norm = rope is not None and rope.q_weight is not None and rope.k_weight is not None
    rope_arguments = (None,) * 7 if rope is None else (*rope, k_cache, v_cache)
    arguments = (
        q, *_cache_maps(k_cache, v_cache), out, partial, tops, totals, counters, page_table, rows, query_start, lengths,
        *rope_arguments, sequences, tokens, kv_heads, slots, scale * LOG2E, q.stride(0) // dim, page_table.stride(0),
    )  # fmt: skip
    block = 32 if sequences <= 32 else 256
    shape = (group, dim, window, CHUNK, limit, RING_BYTES // (PAGE_SIZE * dim * 2), block, rope is not None, norm)
    programs = min(pairs * slots, PROGRAMS * multiprocessors(q.device))
    _launch(decode_hopper_kernel, programs, arguments, shape, (q.dtype,), num_warps=4, maxnreg=128, launch_pdl=True)
