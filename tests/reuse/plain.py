"""A model that needs no weights: keys and marks are functions of the tokens before them, so what a cache must hold at
any boundary is known from the tokens alone."""

import functools
import hashlib

import torch

from octavo.config import NEVER, CacheSettings
from octavo.kv import CacheShape, Memory, PagedCache

L, H, D = 2, 2, 4
SHAPE = CacheShape(L, L, H, D, torch.float32, torch.device("cpu"))
CHUNK = 16


def new_memory():
    return Memory(SHAPE.layout(CacheSettings(CHUNK, 4)), H, SHAPE.device, None)


@functools.cache
def told(prefix):
    """(key [L, H, D], marked [L, H]) of the last token of a prefix."""
    digest = hashlib.sha256(repr(prefix).encode()).digest()
    g = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    return torch.randn(L, H, D, generator=g), torch.rand(L, H, generator=g) < 0.7


def read(cache, tokens, end, passes=False):
    """Read tokens up to `end` into a cache, in forwards that end at multiples of a chunk and, unless one `passes` them,
    at kept boundaries."""
    while cache.seen < end:
        first = cache.seen
        wanted = [] if passes else [p for p in cache.sequences.boundaries.wanted if p > first]
        last = min([end, first + CHUNK - first % CHUNK, *wanted])
        made = [told(tuple(tokens[: i + 1])) for i in range(first, last)]
        key = torch.stack([k for k, _ in made], 2)[:, None]  # [L, 1, H, N, D]
        marked = torch.stack([m for _, m in made], 2)[:, None]
        step = cache.begin(1, last - first, None)
        for layer in range(L):
            cache.update(key[layer], key[layer], layer)
            decides = cache.eviction is not None and not step.decides_at_commit
            step.update(layer, key[layer], -key[layer], marked[layer] if decides else None)
            step.attend(layer, torch.zeros(1, H, last - first, D), 1.0)
            step.settle(layer)
        cache.commit(marked if cache.eviction is not None and step.decides_at_commit else None)


def wanted(tokens, p, eviction):
    """What is held at boundary p: {(layer, head, position, expiry, key[0], value[0])}."""
    shift = eviction.shift if eviction else 0
    out = set()
    for i in range(p):
        key, _ = told(tuple(tokens[: i + 1]))
        for layer in range(L):
            for head in range(H):
                expiry = NEVER
                if eviction is not None and i + shift < p and told(tuple(tokens[: i + shift + 1]))[1][layer, head]:
                    expiry = i + eviction.window
                if expiry >= p:
                    out.add((layer, head, i, expiry, key[layer, head, 0].item(), -key[layer, head, 0].item()))
    return out


def held(cache):
    """The same of a cache, from its pages."""
    (row,), tables = cache.rows, cache.tables
    position, out, S = int(tables.position[row]), set(), tables.pool.layout.page_size
    for layer in range(L):
        for head in range(H):
            for i in range(int(tables.length[row, layer, head])):
                page, at = int(tables.table[row, layer, head, i // S]), i % S
                pages = tables.pool.pages
                expiry = int(pages.expiry[page, at])
                if expiry >= position:
                    slot = int(pages.position[page, at]), expiry
                    each = (layer, head, *slot, pages.key[page, at, 0].item(), pages.value[page, at, 0].item())
                    assert each not in out, "a slot is there once"
                    out.add(each)
    return out


class Model:
    """What requests need of a model, with its memory."""

    def __init__(self, eviction):
        self.eviction, self.memory = eviction, new_memory()
        self.identity = {"of": "a test", "eviction": str(eviction)}

    def cache(self):
        return PagedCache(SHAPE, self.eviction, self.memory)

    def ask(self, store, tokens, end=None, check=True):
        """One request: look up, check what was restored, read the rest, insert; `end`: where generation has ended, so
        tokens past it are the answer's. Returns how many tokens were restored."""
        cache, n = self.cache(), len(tokens) if end is None else end
        with store.open(cache, self.identity, tokens[:n], wait=False) as reading:
            if check and reading.boundary:
                assert cache.seen == reading.boundary < n
                assert held(cache) == wanted(tokens, reading.boundary, self.eviction)
            read(cache, tokens, n)
            reading.insert(cache)
            if end is not None:
                read(cache, tokens, len(tokens))
                reading.insert(cache, 0, tokens)
        if check:
            assert held(cache) == wanted(tokens, len(tokens), self.eviction)
        return reading.boundary
