"""Arenas: memory whose contents can be given back to the machine while its addresses stay, so that all that holds addresses (CUDA graphs, tensor
maps, views) is valid again once there is memory behind them.

Owns the ways to such memory: anonymous pages of the host, and CUDA's virtual memory management, called in libcuda through ctypes (torch's own
allocator cannot do it). What lies in an arena, and when it must be there, is sleep.py's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from abc import ABC, abstractmethod
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

ALIGN = 512  # bytes: where tensors begin, as in torch's own allocator


def aligned(size: int, to: int = ALIGN) -> int:
    """The least multiple of `to` that is not below `size`."""
    return -(-size // to) * to


class Wanted:
    """How large an arena must be for all that is taken here. The tensors have no memory."""

    size = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.size += aligned(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device="meta")


class Arena(ABC):
    """`size` bytes, of which tensors are taken one behind the other and never given back. `mapped`: is there memory behind the addresses."""

    bytes: Tensor  # all of it

    def __init__(self, size: int) -> None:
        self.size, self.mapped = size, True
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of what is left. Its values are not set."""
        count = math.prod(shape) * dtype.itemsize
        start, self._taken = self._taken, aligned(self._taken + count)
        assert self.mapped and start + count <= self.size, "an arena is made as large as all that is taken from it"
        return self.bytes[start : start + count].view(dtype).view(shape)

    def release(self) -> None:
        """Gives the memory back; the values are lost. The device must be done with it."""
        if self.mapped:
            self._release()
            self.mapped = False

    def restore(self) -> None:
        """Memory again, at the same addresses. RuntimeError if there is not enough; then nothing has changed."""
        if not self.mapped:
            self._restore()
            self.mapped = True

    @abstractmethod
    def _release(self) -> None: ...

    @abstractmethod
    def _restore(self) -> None: ...


def make_arena(size: int, device: torch.device) -> Arena:
    """An arena on a device. Host memory is zero at first and after every `restore`; a GPU's is whatever was there."""
    return CudaArena(size, device, driver()) if device.type == "cuda" else HostArena(size)


class HostArena(Arena):
    """Anonymous pages, which the system gives when they are first written to."""

    def __init__(self, size: int) -> None:
        super().__init__(aligned(max(size, 1), mmap.PAGESIZE))
        self._pages = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # what numpy asks for its arrays
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)

    def _release(self) -> None:
        self._pages.madvise(mmap.MADV_DONTNEED)

    def _restore(self) -> None:
        """The pages come by themselves."""


def trim_heap() -> None:
    """Has the C library give freed memory back to the system, where it can (glibc keeps blocks of up to 32 MiB)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ------------------------------------------------------------------------------------------------------------- CUDA


class CudaArena(Arena):
    """A range of a GPU's addresses, and one allocation behind it. Lives as long as any tensor taken from it."""

    def __init__(self, size: int, device: torch.device, driver: Driver) -> None:
        number = driver.enter(device)
        super().__init__(aligned(max(size, 1), driver.granularity(number)))
        self._range = _Range(driver, self.size, number)
        self.bytes = driver.tensor(self._range, device)

    def _release(self) -> None:
        self._range.unmap()

    def _restore(self) -> None:
        self._range.map()


class _Range:
    """Addresses and, while `mapped`, memory of a device behind them; both go with the object. torch takes it for an array of bytes."""

    def __init__(self, driver: Driver, size: int, device: int) -> None:
        self._driver, self.size, self._device = driver, size, device
        self.mapped = False
        self.address = driver.reserve(size)
        self.map()

    def map(self) -> None:
        self._driver.map(self.address, self.size, self._device)
        self.mapped = True

    def unmap(self) -> None:
        self._driver.unmap(self.address, self.size)
        self.mapped = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 2}

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "address"):
            return  # the process's end frees everything; or nothing was reserved
        if self.mapped:
            self._driver.leave()
            self.unmap()
        self._driver.free(self.address, self.size)


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4)]


class _Allocation(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [("type", c_int), ("handles", c_int), ("location", _Location), ("windows", c_void_p), ("flags", _AllocationFlags)]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", c_int)]


_PINNED, _ON_DEVICE, _READ_WRITE, _RECOMMENDED = 1, 1, 3, 1  # members of the driver's enumerations
_OUT_OF_MEMORY = 2

_FUNCTIONS: dict[str, list[Any]] = {
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(_Allocation), c_int],
    "cuMemAddressReserve": [POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemAddressFree": [c_uint64, c_size_t],
    "cuMemCreate": [POINTER(c_uint64), c_size_t, POINTER(_Allocation), c_uint64],
    "cuMemRelease": [c_uint64],
    "cuMemMap": [c_uint64, c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemUnmap": [c_uint64, c_size_t],
    "cuMemSetAccess": [c_uint64, c_size_t, POINTER(_Access), c_size_t],
}


@cache
def driver() -> Driver:
    """The machine's."""
    return Driver(ctypes.CDLL("libcuda.so.1"))


class Driver:
    """What of libcuda is needed here. Every call that fails is a RuntimeError with its name and the driver's word for the reason."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, c_int

    def enter(self, device: torch.device) -> int:
        """Makes sure that torch's context of the device is this thread's; returns the driver's number of the device."""
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.synchronize()
        context, number = c_void_p(), c_int()
        self._call("cuCtxGetCurrent", byref(context))
        if not context.value:
            raise RuntimeError("cuCtxGetCurrent: torch has made no CUDA context current in this thread")
        self._call("cuDeviceGet", byref(number), torch.cuda.current_device())
        return number.value

    def leave(self) -> None:
        """Waits until the device is done with all memory."""
        torch.cuda.synchronize()

    def granularity(self, device: int) -> int:
        """Of what sizes and addresses must be multiples."""
        result = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(result), byref(_allocation(device)), _RECOMMENDED)
        return result.value

    def reserve(self, size: int) -> int:
        """Addresses with nothing behind them."""
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        return address.value

    def free(self, address: int, size: int) -> None:
        """Undoes `reserve`."""
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, device: int) -> None:
        """Memory of a device behind addresses. A RuntimeError leaves none there."""
        handle = c_uint64()
        try:
            self._call("cuMemCreate", byref(handle), size, byref(_allocation(device)), 0)
        except _OutOfMemory as e:
            raise RuntimeError(f"the GPU has no {size / 2**30:.2f} GiB free ({e})") from None
        try:
            self._call("cuMemMap", address, size, 0, handle, 0)
        finally:
            self._call("cuMemRelease", handle)  # from now on the mapping alone keeps the memory
        try:
            self._call("cuMemSetAccess", address, size, byref(_Access(_Location(_ON_DEVICE, device), _READ_WRITE)), 1)
        except RuntimeError:
            self.unmap(address, size)
            raise

    def unmap(self, address: int, size: int) -> None:
        """Undoes `map`: the memory is free for others."""
        self._call("cuMemUnmap", address, size)

    def tensor(self, memory: _Range, device: torch.device) -> Tensor:
        """A range as bytes; it lives as long as the tensor and its views."""
        result = torch.as_tensor(memory, device=device)
        assert result.data_ptr() == memory.address, "torch has made a copy"
        return result

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = c_char_p()
            self._library.cuGetErrorName(code, byref(text))
            error = _OutOfMemory if code == _OUT_OF_MEMORY else RuntimeError
            raise error(f"{name}: {text.value.decode() if text.value else f'error {code}'}")


class _OutOfMemory(RuntimeError):
    pass


def _allocation(device: int) -> _Allocation:
    return _Allocation(type=_PINNED, location=_Location(_ON_DEVICE, device))
