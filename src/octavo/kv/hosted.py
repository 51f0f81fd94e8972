"""Copies on the host of slots that lie on a GPU.

Fresh memory costs more than the copy: the system hands it out in pages of 4 KiB, each at the price of a fault (110 MB
took 75 ms, 7 ms of which were the copy). So larger copies lie in a mapping of their own, in huge pages, which is made
known to CUDA: what is known so is copied at the speed of the bus, to the host now and to the device at every hit.
"""

import ctypes
import mmap
import os
import weakref
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from octavo.kv.snapshot import Ragged

SMALL = 2**20  # bytes up to which a copy is an ordinary one
PORTABLE = 1  # of cudaHostRegister: known to all devices
_ALIGNED = 64
_known: set["Mapping"] = set()  # what CUDA may know; it must not be unmapped, or what comes to lie there would be lost


class Mapping(mmap.mmap):
    """Anonymous memory in huge pages where the system has them. Tensors are made of its `view`, which keeps it."""

    address = 0

    @classmethod
    def of(cls, nbytes: int) -> "Mapping":
        """So much memory, all zero. Raises OSError where the system has none."""
        kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        made = cls(-1, nbytes, **kind)
        made.address = ctypes.addressof(ctypes.c_char.from_buffer(made))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                made.madvise(mmap.MADV_HUGEPAGE)
        return made

    def pinned(self, device: torch.device) -> memoryview:
        """A view of the memory, which CUDA knows as long as the view lives. Where CUDA does not want to know it, copies
        are slower and nothing else."""
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        view = memoryview(self)
        _known.add(self)  # before CUDA knows: an interrupt loses memory rather than what is written to it
        weakref.finalize(view, _forget, self, cuda, os.getpid()).atexit = False
        with nullcontext() if device.index is None else torch.cuda.device(device):
            known = cuda.cudaHostRegister(self.address, len(self), PORTABLE) == cuda.cudaError.success
        if not known:
            _known.discard(self)
            take_error(device)
        return view


def _forget(memory: Mapping, cuda: Any, process: int) -> None:
    """Tell CUDA that memory goes; where CUDA does not let go of it, it stays."""
    ours = memory in _known and process == os.getpid()  # a child process has no CUDA of its parent's
    if not ours or cuda.cudaHostUnregister(memory.address) == cuda.cudaError.success:
        _known.discard(memory)


def take_error(device: torch.device) -> None:
    """Let CUDA forget an error that was met: the next kernel's launch would be taken for what failed."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).add_(1)


def host(part: Ragged) -> Ragged:
    """The same slots on the host; waits for the device."""
    room = None
    if part.key.is_cuda and sum(t.nbytes for t in part.tensors.values()) > SMALL:
        with suppress(OSError):  # no such memory is left
            room = _room(part.tensors, part.key.device)
    if room is None:
        return Ragged(**{name: t.cpu() for name, t in part.tensors.items()})
    try:
        for name, t in part.tensors.items():
            room[name].copy_(t, non_blocking=True)
    finally:  # nothing may be on its way to memory that goes
        torch.cuda.current_stream(part.key.device).synchronize()
    return Ragged(**room)


def _room(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the same shapes, one behind the other in a mapping of their own, for copies from and to a device."""
    places, nbytes = {}, 0
    for name, t in tensors.items():
        places[name] = nbytes
        nbytes += -(-t.nbytes // _ALIGNED) * _ALIGNED
    memory = Mapping.of(nbytes).pinned(device)
    return {
        name: torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=places[name]).view(t.shape)
        if t.numel()
        else torch.empty(t.shape, dtype=t.dtype)
        for name, t in tensors.items()
    }
