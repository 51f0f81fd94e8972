"""The kernel of `stream.cu`: one query per head over pages, with tensor cores; its parts are merged by `decode`.

It serves what most models are when they decode: bfloat16 or float16, heads of 64 or 128 elements, up to 8 query heads
for each KV head. Anything else stays with the kernel in Triton, and so does all where NVRTC is missing.
"""

import struct
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention.cuda import nvrtc
from octavo.attention.cuda.tiles import LOG2E, codes_of
from octavo.attention.pages import Pages

WARPS = 4  # of a block, each of which is a program
WIDE = (64, 128)  # elements of a head
GROUP = 8  # query heads that share a KV head, at most
VECTOR = 16  # bytes that a thread loads at once
_JOB = struct.Struct("18Qf3i17q")  # `Job` in stream.cu


class Kind(NamedTuple):
    """What a kernel is compiled for; see stream.cu."""

    D: int
    G: int
    S: int
    CODES: int
    BF16: int
    WRITES: int
    INDEXED: int

    @property
    def resident(self) -> int:
        """Blocks that a core is to hold at once: as many as its registers allow without spilling."""
        return 4 if self.D == 64 else 3


def kind_of(
    query: Tensor, pages: Pages, group: int, new: tuple[Tensor, Tensor, Tensor, Tensor] | None, indexed: bool
) -> Kind | None:
    """The kernel for queries [B, Hq, n, D] over pages, None: there is none. `new`: see `decode.attend`."""
    D, S = query.shape[3], pages.key.shape[1]
    fits = (
        query.is_cuda
        and query.shape[2] == 1
        and query.dtype in (torch.bfloat16, torch.float16)
        and (pages.key.dtype == query.dtype or pages.key_scale is not None)
        and D in WIDE
        and group <= GROUP
        and S % 16 == 0
        and query.stride(3) == 1
        and (new is None or all(x.dtype == query.dtype and x.stride(3) == 1 for x in new[:2]))
        and (query.data_ptr() | query.stride(0) * 2 | query.stride(1) * 2) % VECTOR == 0
    )
    if not fits:
        return None
    kind = Kind(D, group, S, codes_of(pages), int(query.dtype == torch.bfloat16), int(new is not None), int(indexed))
    return None if _function(kind, query.device) is None else kind


def programs_for(kind: Kind, device: torch.device) -> int:
    """How many programs share the work of a layer: as many as run at once, or fewer where these read as much.

    Fewer programs leave fewer parts to merge. Two blocks a core keep memory busy with 256 bytes a slot, not with 128.
    """
    function = _function(kind, device)
    assert function is not None
    wide = WIDE[-1] == kind.D and not kind.CODES
    blocks = min(2, function.resident) if wide else function.resident
    return WARPS * blocks * torch.cuda.get_device_properties(device).multi_processor_count


def attend(
    kind: Kind, programs: int, part: Tensor, out: Tensor, query: Tensor, at: Tensor, pages: Pages, table: Tensor,
    length: Tensor, scale: float, begin: Tensor, new: tuple[Tensor, Tensor, Tensor, Tensor] | None, rows: Tensor | None,
) -> None:  # fmt: skip
    """Write `out` [B, 1, Hq, D] where one program has seen a whole row, else parts for `decode._merge`.

    The rest as in `decode.attend`; `part` holds (B * H + programs) * G * (D + 1) float32; `programs` is a multiple
    of `WARPS`.
    """
    function = _function(kind, query.device)
    assert function is not None
    key, value, slot, position = new or (query, query, length, at)
    slots = slot.element_size()
    job = _JOB.pack(
        query.data_ptr(), pages.key.data_ptr(), pages.value.data_ptr(),
        0 if pages.key_scale is None else pages.key_scale.data_ptr(),
        0 if pages.value_scale is None else pages.value_scale.data_ptr(),
        pages.position.data_ptr(), pages.expiry.data_ptr(), part.data_ptr(), out.data_ptr(), key.data_ptr(),
        value.data_ptr(), at.data_ptr(), table.data_ptr(), length.data_ptr(), begin.data_ptr(), slot.data_ptr(),
        position.data_ptr(), 0 if rows is None else rows.data_ptr(),
        scale * LOG2E, query.shape[0] * table.shape[1], table.shape[1], 0,
        *query.stride()[:2], at.stride(0), *table.stride()[:2], *length.stride(), out.stride(0),
        pages.key.stride(0) * pages.key.element_size(), pages.position.stride(0),
        *key.stride()[:2], *value.stride()[:2], slot.stride(0) * slots, slot.stride(1) * slots, position.stride(0),
    )  # fmt: skip
    device = query.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            function(programs // WARPS, job, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        function(programs // WARPS, job, torch._C._cuda_getCurrentRawStream(device.index))


@cache
def _function(kind: Kind, device: torch.device) -> nvrtc.Function | None:
    """The compiled kernel; None where it cannot be had, of which the first call warns."""
    if torch.cuda.get_device_capability(device) < ((8, 9) if kind.CODES == 2 else (8, 0)):
        return None
    source = Path(__file__).with_suffix(".cu").read_text()
    try:
        constants = {**kind._asdict(), "RESIDENT": kind.resident}
        return nvrtc.compiled(source, "stream", constants, 32 * WARPS, device)
    except RuntimeError as e:
        warnings.warn(f"decoding uses Triton instead of CUDA C++, which is slower: {e}", stacklevel=2)
        return None
