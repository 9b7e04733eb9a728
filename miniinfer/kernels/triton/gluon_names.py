"""What Gluon, which is experimental, has called differently between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed after 3.6
box_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # these after 3.7
box_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
element_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# A method; (memory, dtype, shape, layout) -> the same shared memory, seen otherwise.
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret  # since 3.9
