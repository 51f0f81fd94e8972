"""Random arguments of the one operation, for the tests of its kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention import Chunk, PageLayout, Pages, write
from octavo.config import NEVER

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = [torch.int8, torch.float8_e4m3fn]


class Case(NamedTuple):
    """The arguments of `attend`, in order."""

    query: Tensor
    at: Tensor
    pages: Pages
    table: Tensor
    length: Tensor
    scale: float
    chunk: Chunk | None

    def __repr__(self) -> str:
        return f"Case(query {tuple(self.query.shape)}, pages {tuple(self.pages.key.shape)} {self.pages.key.dtype})"

    def widened(self) -> "Case":
        """The same numbers in float32, so that the reference rounds nothing (codes are widened by it)."""
        chunk = self.chunk and Chunk(self.chunk.key.float(), self.chunk.value.float(), *self.chunk[2:])
        pages = self.pages
        if pages.key_scale is None:
            pages = pages._replace(key=pages.key.float(), value=pages.value.float())
        return self._replace(query=self.query.float(), pages=pages, chunk=chunk)

    def to(self, device: str) -> "Case":
        """The same on another device."""
        pages, moved = self.pages, {}
        memory = torch.empty(0, dtype=torch.uint8).set_(pages.key.untyped_storage()).to(device)
        moved["pages"] = PageLayout(*pages.key.shape[1:], pages.key.dtype).views(memory)
        for name in ("query", "at", "table", "length"):
            moved[name] = getattr(self, name).to(device)
        moved["chunk"] = self.chunk and Chunk(*(t.to(device) for t in self.chunk))
        return self._replace(**moved)

    def last(self, n: int) -> "Case":
        """The same with the last n queries only."""
        return self._replace(query=self.query[:, :, self.query.shape[2] - n :], at=self.at[:, self.at.shape[1] - n :])


def make_case(
    lengths: list[list[int]],  # [B][H]
    *,
    N: int = 1,
    chunk: bool = True,
    G: int = 1,
    D: int = 64,
    S: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    pad: tuple[int, int] = (0, 0),
    padding: float = 0.0,
    window: int | None = None,
    marked: float = 0.8,
    disorder: float = 0.0,
    unused: float = float("nan"),
    seed: int = 0,
) -> Case:
    """Ragged rows on shuffled pages: slots in no order, `unused` where nothing is stored.

    N queries, which are the chunk's tokens where there is a `chunk` and the newest slots of no row otherwise. `marked`
    tokens expire after `window` more (None: never). `pad` tokens are padding on the left and right, and a share
    `padding` of the others. A share `disorder` of the slots gets any position and expiry: in the future, long past.
    """
    rng = torch.Generator().manual_seed(seed)
    B, H = len(lengths), len(lengths[0])
    used = torch.tensor(lengths, dtype=torch.int32).view(B, H)
    longest = int(used.max()) if used.numel() else 0
    M = max(1, -(-longest // S))
    P = B * H * M + 1
    table = torch.randperm(P, generator=rng)[: B * H * M].int().view(B, H, M)
    first = 2 * longest + 3
    flat = torch.arange(M * S)
    inside = flat < used[..., None]  # [B, H, M * S]
    page, place = table[:, :, flat // S][inside].long(), (flat % S).expand(B, H, -1)[inside]  # of slots in use

    position = torch.randint(0, first, (B, H, M * S), generator=rng)
    expiry = torch.full_like(position, NEVER)
    new = first + torch.arange(N).expand(B, H, N)
    new_expiry = torch.full_like(new, NEVER)
    if window is not None:
        expiry = torch.where(torch.rand(expiry.shape, generator=rng) < marked, position + window, expiry)
        new_expiry = torch.where(torch.rand(B, H, N, generator=rng) < marked, new + window, new_expiry)
    strange = torch.rand(position.shape, generator=rng) < disorder
    anything = torch.randint(-1, first + N + 9, (2, *position.shape), generator=rng)
    position, expiry = torch.where(strange, anything[0], position), torch.where(strange, anything[1], expiry)

    layout = PageLayout(S, D, stored)
    pages = layout.views(torch.zeros(P * layout.nbytes, dtype=torch.uint8))
    if pages.key_scale is None:
        pages.key.fill_(unused)
        pages.value.fill_(unused)
    pages.position.fill_(-7)
    pages.expiry.fill_(-7)
    write(pages, page, place, *torch.randn(2, len(page), D, generator=rng))
    pages.position[page, place], pages.expiry[page, place] = position[inside].int(), expiry[inside].int()

    at = new[:, 0].int().contiguous() if H else torch.zeros(B, N, dtype=torch.int32)
    at[torch.rand(B, N, generator=rng) < padding] = -1
    at[:, : pad[0]] = -1
    at[:, N - pad[1] :] = -1
    q, k, v = (torch.randn(B, N, heads, D, generator=rng).to(dtype).transpose(1, 2) for heads in (G * H, H, H))
    tokens = Chunk(k, v, at, new_expiry.int().contiguous()) if chunk else None
    return Case(q, at, pages, table, used, D**-0.5, tokens)


def misuses(case: Case) -> list[dict]:
    """Changes of the arguments of a case with several tokens and one KV head or more, each to be refused."""
    chunk, pages = case.chunk, case.pages
    (P, S, D), memory = pages.key.shape, torch.zeros(10**6, dtype=torch.uint8)
    apart, coded = PageLayout(S, D // 2, torch.float32).views(memory), PageLayout(S, D, torch.int8).views(memory)
    coded = Pages(*(t[:P] for t in coded))
    return [
        {"chunk": chunk._replace(key=chunk.key.double())},
        {"length": case.length.long()},
        {"length": case.length[:, :1]},
        {"at": case.at[:, :0]},
        {"chunk": chunk._replace(position=chunk.position[:, :0])},
        {"chunk": chunk._replace(value=_across(chunk.value))},
        {"chunk": chunk._replace(expiry=_across(chunk.expiry))},
        {"chunk": chunk._replace(key=chunk.key.to("meta"))},
        {"pages": pages._replace(key=pages.key.contiguous())},
        {"pages": pages._replace(value=apart.value)},
        {"pages": pages._replace(key_scale=torch.ones(pages.position.shape))},
        {"query": _across(case.query)},
        {"query": case.query[:, :, 1:]},
        {"query": case.query.to("meta")},
        *({"pages": coded._replace(**change)} for change in _scales(coded)),
    ]


def _scales(coded: Pages) -> list[dict]:
    """Scales that do not go with these codes."""
    scale = coded.key_scale
    return [
        {"key_scale": None},
        {"value_scale": scale.double()},
        {"value_scale": scale[:, :1]},
        {"key_scale": scale.contiguous()},  # not where the pages are
        {"key_scale": scale.to("meta")},
    ]


def _across(x: Tensor) -> Tensor:
    """The same with its last dimension no longer contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)
