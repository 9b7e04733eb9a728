"""What Gluon, which is experimental, has called differently between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed after 3.6
box_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # these after 3.7
box_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
element_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # since 3.9

    @gluon.jit
    def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as numbers of another type, shape or layout."""
        return memory.reinterpret(dtype, shape, layout)

else:

    @gluon.jit
    def reinterpret(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as numbers of another type, shape or layout."""
        return memory._reinterpret(dtype, shape, layout)
