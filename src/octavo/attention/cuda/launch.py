"""Starting a Triton kernel many times with little work on the host.

Triton looks at every argument of every launch to find the compilation that fits, which takes longer than a layer of a
small model. A `Launcher` asks it once for each kind of arguments and starts what it was given from then on.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes: a kernel may read vectors of so many
KINDS = 4096  # kinds of arguments that are remembered


class Launcher:
    """One kernel, decorated with `triton.jit`.

    Its parameters are, in this order: tensors of any dtype; tensors whose dtype never changes and which it must not
    specialise on their alignment; one float; integers; constants.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        tables: Sequence[Tensor],
        scale: float,
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        """Start it. Triton compiles anew for other dtypes, numbers or constants, so these make up the kind.

        It also does for memory that does not begin at a multiple of `ALIGNED`; that is rare, and left to Triton.
        """
        place = (tensors or tables)[0].device
        if place.type == "cuda" and place.index != torch.cuda.current_device():
            with torch.cuda.device(place):
                return self(grid, tensors, tables, scale, numbers, constants, **options)
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        kind = (place, tuple([t.dtype for t in tensors]), numbers, constants)
        compiled = self._compiled.get(kind) if addresses % ALIGNED == 0 else None
        if compiled is not None:
            stream = torch._C._cuda_getCurrentRawStream(place.index)
            compiled[grid](*tensors, *tables, scale, *numbers, *constants, stream=stream)
            return None
        compiled = self._kernel[grid](*tensors, *tables, scale, *numbers, *constants, **options)
        if compiled is not None and addresses % ALIGNED == 0:  # Triton's interpreter compiles nothing
            if len(self._compiled) >= KINDS:
                self._compiled.clear()
            self._compiled[kind] = compiled
        return None
