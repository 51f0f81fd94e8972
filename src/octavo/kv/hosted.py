"""Copies on the host of slots that lie on a GPU.

Fresh memory costs more than the copy: the system hands it out in pages of 4 KiB, each at the price of a fault (110 MB
took 75 ms, 7 ms of which were the copy). So larger copies lie in a mapping of their own, in huge pages, which is made
known to CUDA: what is known so is copied at the speed of the bus, to the host now and to the device at every hit.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor

from octavo.kv.snapshot import Ragged

SMALL = 2**20  # bytes up to which a copy is an ordinary one
_ALIGNED = 64


class Mapping(mmap.mmap):
    """Anonymous memory in huge pages where the system has them. Tensors made of it keep it."""

    address = 0
    _forget: Callable[[int], Any] | None = None  # tells CUDA that the memory goes
    _process = 0

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

    def pin(self, device: torch.device) -> bool:
        """Make the memory known to CUDA; False where it cannot be, which makes copies slower and nothing else."""
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if cuda.cudaHostRegister(self.address, len(self), 0) != cuda.cudaError.success:
            take_error(device)
            return False
        self._forget, self._process = cuda.cudaHostUnregister, os.getpid()
        return True

    def __del__(self) -> None:
        if self._forget is not None and self._process == os.getpid():  # a child process has no CUDA of its parent's
            with suppress(Exception):  # at the end of the process CUDA may be gone
                self._forget(self.address)


def take_error(device: torch.device) -> None:
    """Let CUDA forget an error that was met: the next kernel's launch would be taken for what failed."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).add_(1)


def host(part: Ragged) -> Ragged:
    """The same slots on the host; waits for the device."""
    if not part.key.is_cuda or sum(t.nbytes for t in part.tensors.values()) <= SMALL:
        return Ragged(**{name: t.cpu() for name, t in part.tensors.items()})
    try:
        room = _room(part.tensors, part.key.device)
    except OSError:
        return Ragged(**{name: t.cpu() for name, t in part.tensors.items()})
    for name, t in part.tensors.items():
        room[name].copy_(t, non_blocking=True)
    torch.cuda.current_stream(part.key.device).synchronize()
    return Ragged(**room)


def _room(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the same shapes, one behind the other in a mapping of their own, for copies from and to a device."""
    places, nbytes = {}, 0
    for name, t in tensors.items():
        places[name] = nbytes
        nbytes += -(-t.nbytes // _ALIGNED) * _ALIGNED
    memory = Mapping.of(nbytes)
    memory.pin(device)
    return {
        name: torch.frombuffer(memory, dtype=t.dtype, count=prod(t.shape), offset=places[name]).view(t.shape)
        if t.numel()
        else torch.empty(t.shape, dtype=t.dtype)
        for name, t in tensors.items()
    }
