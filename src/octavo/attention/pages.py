"""How keys and values lie in memory: typed pages, and the chunk of new tokens beside them.

A page holds `page_size` slots of one (sequence, layer, KV head). A slot is a key, a value, a position and an expiry,
and a scale each for key and value where they are stored as codes. All of a page lies together, so that one number, the
page's, finds everything of it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # dtypes of codes, and the largest code of each
_ALIGNED = 16  # bytes: parts of a page begin at multiples of it, for vector loads on a GPU


class Pages(NamedTuple):
    """All slots of all pages, as views of one memory.

    A value of -1 in `position` and `expiry` marks a slot that holds nothing.
    """

    key: Tensor  # [P, S, D] of the stored dtype
    value: Tensor  # [P, S, D]
    key_scale: Tensor | None  # [P, S] float32: key = code * scale; None where the stored dtype is what is meant
    value_scale: Tensor | None
    position: Tensor  # [P, S] int32
    expiry: Tensor  # [P, S] int32


class Chunk(NamedTuple):
    """New tokens that are not in pages yet; they take part in attention by the same rule as slots do."""

    key: Tensor  # [B, H, N, D]
    value: Tensor  # [B, H, N, D]
    position: Tensor  # [B, N] int32, -1 is padding
    expiry: Tensor  # [B, H, N] int32


class Scoring(NamedTuple):
    """What scores are beside products of queries and keys.

    `softcap`: a score s becomes softcap * tanh(s / softcap) (Gemma 2). `sinks` [Hq]: a score of each query head that
    joins its softmax and has no value (gpt-oss).
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Scores as they go into the softmax, before anything is masked."""
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


@dataclass(frozen=True)
class PageLayout:
    """The bytes of a page of `page_size` slots.

    `dtype` is how keys and values [head_dim] are stored: float32, bfloat16, float16, int8 or float8_e4m3fn, which need
    not be what the model computes in.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def quantised(self) -> bool:
        """Whether slots hold codes with a scale."""
        return self.dtype in CODES

    @cached_property
    def _parts(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """(first byte, elements per slot, dtype) of every part of a page, by its name in `Pages`."""
        wanted = [("key", self.head_dim, self.dtype), ("value", self.head_dim, self.dtype)]
        if self.quantised:
            wanted += [("key_scale", 1, torch.float32), ("value_scale", 1, torch.float32)]
        wanted += [("position", 1, torch.int32), ("expiry", 1, torch.int32)]
        parts, at = {}, 0
        for name, elements, dtype in wanted:
            parts[name] = (at, elements, dtype)
            at += _aligned(self.page_size * elements * dtype.itemsize)
        return parts

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one page."""
        first, elements, dtype = self._parts["expiry"]
        return first + _aligned(self.page_size * elements * dtype.itemsize)

    def views(self, memory: Tensor) -> Pages:
        """The pages in a memory [n] uint8 that begins with the first one; what is left at the end is unused."""
        count = len(memory) // self.nbytes
        raw = memory[: count * self.nbytes].view(count, self.nbytes)
        made: dict[str, Tensor | None] = dict.fromkeys(Pages._fields)
        for name, (first, elements, dtype) in self._parts.items():
            view = raw[:, first : first + self.page_size * elements * dtype.itemsize].view(dtype)
            made[name] = view.view(count, self.page_size, elements) if name in ("key", "value") else view
        return Pages(**made)  # type: ignore[arg-type]


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scale) with x [..., D] = codes * scale: codes of `dtype` [..., D], a key of `CODES`, scale float32 [...].

    Symmetric, one scale per slot and head, from the largest element: rounding costs at most half a 127th of that in
    int8, a 16th of each element itself in float8.
    """
    wide = x.float()
    scale = wide.abs().amax(-1).clamp(min=1e-30) / CODES[dtype]
    codes = wide / scale[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def read(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored keys or values [..., D] in `dtype`; `scale` [...] float32 where they are codes, else None."""
    if scale is None:
        return stored.to(dtype)
    return (stored.float() * scale[..., None]).to(dtype)


def rows(pages: Pages, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values in the pages of a table [..., M], each [..., M, S, D] of `dtype`."""
    made = []
    for stored, scales in ((pages.key, pages.key_scale), (pages.value, pages.value_scale)):
        if scales is None:
            made.append(read(stored[table], None, dtype))
        else:  # indexing does not know float8, so codes are moved as bytes
            codes = stored.view(torch.uint8)[table].view(stored.dtype)
            made.append(read(codes, scales[table], dtype))
    return made[0], made[1]


def write(pages: Pages, page: Tensor, inside: Tensor, key: Tensor, value: Tensor) -> None:
    """Store keys and values [..., D] of any dtype in slot `inside` [...] int64 of page `page` [...] int64.

    Positions and expiries are the caller's to write. Of two that go into the same slot, either may win.
    """
    for stored, scales, given in ((pages.key, pages.key_scale, key), (pages.value, pages.value_scale, value)):
        if scales is None:  # index_put_ costs the host half of what an assignment costs, once per layer and token
            stored.index_put_((page, inside), given if given.dtype == stored.dtype else given.to(stored.dtype))
        else:
            codes, scale = quantised(given, stored.dtype)
            stored.view(torch.uint8)[page, inside] = codes.view(torch.uint8)  # index_put does not know float8
            scales[page, inside] = scale


def slots(pages: Pages, page: Tensor, inside: Tensor) -> list[Tensor]:
    """Copies of all that is stored in slot `inside` [...] of page `page` [...], both int64, to be put back by `put`:
    one tensor [...] or [..., D] for each part of `Pages` that is there, codes in float8 as uint8."""
    return [part[page, inside] for part in _parts(pages)]


def put(pages: Pages, page: Tensor, inside: Tensor, stored: list[Tensor]) -> None:
    """Store what `slots` gave, to the bit."""
    for part, given in zip(_parts(pages), stored, strict=True):
        part[page, inside] = given


def _parts(pages: Pages) -> list[Tensor]:
    """The parts of pages in a form that can be indexed: float8 cannot, so codes are shown as bytes."""
    return [t.view(torch.uint8) if t.dtype in CODES else t for t in pages if t is not None]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
