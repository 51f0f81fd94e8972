"""Address ranges: memory whose addresses are reserved at once and which is backed slab by slab, and given back so.

A page then never moves, whatever grows or shrinks, and one strided tensor shows all pages. On the host the system
backs what is touched; on CUDA slabs are mapped by the driver; elsewhere the whole range is one allocation.
"""

import ctypes
import mmap
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CacheBudgetError

HOST_SLAB = 64 * 1024  # bytes
CUDA_SLAB = 32 * 2**20  # bytes; the driver takes about 0.1 ms for a slab of any size
SMALL_CUDA_SLAB = 2 * 2**20  # what the driver maps at least, for small ranges
SMALL = 2**30  # bytes up to which a range is small
ELSEWHERE = 2**30  # bytes of a range on other devices, where no budget says how many


class AddressRange:
    """A range on a device without memory mapping: one allocation, whose slabs are counted but never given back."""

    def __init__(self, nbytes: int, device: torch.device, slab: int) -> None:
        self.slab = slab
        self.memory = self._reserved(-(-nbytes // self.slab) * self.slab, device)  # [n] uint8
        self.backed: set[int] = set()

    @property
    def slabs(self) -> int:
        """Slabs in the range, backed or not."""
        return len(self.memory) // self.slab

    @property
    def nbytes(self) -> int:
        """Bytes backed."""
        return len(self.backed) * self.slab

    def back(self, slab: int) -> None:
        """Give a slab memory, all zero. Raises CacheBudgetError where the device has none left."""
        if slab not in self.backed:
            self._back(slab)
            self.backed.add(slab)

    def release(self, slab: int) -> None:
        """Give a slab's memory back; its content is lost."""
        if slab in self.backed:
            self.backed.discard(slab)
            self._release(slab)

    def _reserved(self, nbytes: int, device: torch.device) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def _back(self, slab: int) -> None:
        pass

    def _release(self, slab: int) -> None:
        self.memory[slab * self.slab : (slab + 1) * self.slab].zero_()


class HostRange(AddressRange):
    """Anonymous memory: the system backs a slab when it is first written, and forgets it when told so."""

    def _reserved(self, nbytes: int, device: torch.device) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        while True:
            try:
                self._map = mmap.mmap(-1, nbytes, flags=flags)
                return torch.frombuffer(self._map, dtype=torch.uint8)
            except (OSError, ValueError):  # a system that promises no more than it has
                if nbytes <= self.slab:
                    raise
                nbytes = nbytes // 2 // self.slab * self.slab or self.slab

    def _release(self, slab: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, slab * self.slab, self.slab)
        if not hasattr(mmap, "MADV_DONTNEED") or mmap.MADV_DONTNEED != 4:  # only Linux promises zeros
            super()._release(slab)


class CudaRange(AddressRange):
    """Virtual memory of a CUDA device: slabs are created, mapped and unmapped by the driver."""

    def _reserved(self, nbytes: int, device: torch.device) -> Tensor:
        self._device = device
        self._range = _CudaAddresses(nbytes, device)
        self._range.map(0, self.slab)  # torch asks the driver whose address this is
        return torch.as_tensor(self._range, device=device)

    def _back(self, slab: int) -> None:
        try:
            self._range.map(slab * self.slab, self.slab)
        except MemoryError:
            torch.cuda.empty_cache()  # what torch holds without need
            try:
                self._range.map(slab * self.slab, self.slab)
            except MemoryError as e:
                raise CacheBudgetError(f"{self._device} has no memory left for the KV cache") from e
        self.memory[slab * self.slab : (slab + 1) * self.slab].zero_()

    def _release(self, slab: int) -> None:
        if slab:  # the first one stays, see `_reserved`
            torch.cuda.synchronize(self._device)  # kernels in flight may still read it
            self._range.unmap(slab * self.slab)
        else:
            super()._release(slab)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3


class _CudaAddresses:
    """The driver's calls for one range; lives as long as any tensor over it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        torch.zeros(1, device=device)  # makes the device's context
        index = torch.cuda.current_device() if device.index is None else device.index
        self._index = index
        self._driver = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
        base = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(base), _size(nbytes), _size(0), ctypes.c_uint64(0), _size(0))
        self._base = base.value
        self._handles: dict[int, tuple[int, int]] = {}  # offset -> (handle, bytes)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._base, False),
            "strides": None,
            "version": 3,
        }
        weakref.finalize(self, _free, self._driver, index, self._base, nbytes, self._handles)

    def map(self, offset: int, nbytes: int) -> None:
        """Back a part of the range. Raises MemoryError where the device has no memory left."""
        if offset in self._handles:
            return
        where = _Location(_ON_DEVICE, self._index)
        properties = _Properties(_PINNED, 0, where, None, (ctypes.c_ubyte * 8)())
        handle = ctypes.c_uint64()
        self._call("cuMemCreate", ctypes.byref(handle), _size(nbytes), ctypes.byref(properties), _size(0))
        at = ctypes.c_uint64(self._base + offset)
        self._call("cuMemMap", at, _size(nbytes), _size(0), handle, _size(0))
        self._handles[offset] = (handle.value, nbytes)
        access = _Access(where, _READ_WRITE)
        self._call("cuMemSetAccess", at, _size(nbytes), ctypes.byref(access), _size(1))

    def unmap(self, offset: int) -> None:
        """Give a part that was mapped back."""
        handle, nbytes = self._handles.pop(offset)
        self._call("cuMemUnmap", ctypes.c_uint64(self._base + offset), _size(nbytes))
        self._call("cuMemRelease", ctypes.c_uint64(handle))

    def _call(self, name: str, *args: Any) -> None:
        with torch.cuda.device(self._index):
            status = getattr(self._driver, name)(*args)
        if status == 2:
            raise MemoryError(name)
        if status != 0:
            raise RuntimeError(f"{name} gave the CUDA error {status}")


def _size(n: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(n)


def _free(driver: Any, index: int, base: int, nbytes: int, handles: dict[int, tuple[int, int]]) -> None:
    """Give a whole range back; at the interpreter's end the driver may be gone already and its answers mean nothing."""
    try:
        torch.cuda.synchronize(index)
    except Exception:
        return
    for offset, (handle, part) in handles.items():
        driver.cuMemUnmap(ctypes.c_uint64(base + offset), _size(part))
        driver.cuMemRelease(ctypes.c_uint64(handle))
    driver.cuMemAddressFree(ctypes.c_uint64(base), _size(nbytes))


def slab_of(device: torch.device, nbytes: int | None) -> int:
    """Bytes that memory is taken and given back in, of a range of `nbytes` (None: a device's whole memory)."""
    if device.type != "cuda":
        return HOST_SLAB
    return SMALL_CUDA_SLAB if nbytes is not None and nbytes <= SMALL else CUDA_SLAB


def spare_of(device: torch.device) -> int:
    """Bytes of free pages that stay backed when nobody uses them: taking them anew costs time in the next prompt."""
    if device.type != "cuda":
        return 64 * 2**20
    return int(torch.cuda.get_device_properties(device).total_memory) // 32


def reserve(device: torch.device, nbytes: int | None, piece: int = 1) -> AddressRange:
    """A range of `nbytes` addresses on a device; None: as many bytes as the device has memory.

    `piece`: bytes of what is kept there piece by piece. Each slab is at least as large as one.
    """
    least = slab_of(device, nbytes)
    slab = -(-piece // least) * least
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return CudaRange(total if nbytes is None else nbytes, device, slab)
    if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HostRange(total if nbytes is None else nbytes, device, slab)
    return AddressRange(ELSEWHERE if nbytes is None else nbytes, device, slab)
