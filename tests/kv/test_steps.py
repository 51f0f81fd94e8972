"""Page memory against a plain list of tokens: random forwards, failures, forks, crops and leavings of sequences.

After each of them every sequence holds what the visibility rule says, attention equals a softmax over the list, and the
pool's counts are what the tables say.
"""

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.attention import Lifetime
from octavo.config import NEVER, CacheSettings, Eviction
from octavo.errors import CacheStateError
from octavo.kv import CacheShape, Memory, PagedCache

L, H, G, D = 2, 2, 2, 4
SHAPE = CacheShape(L, L, H, D, torch.float32, torch.device("cpu"))


WINDOWS = [(Lifetime(6), None), (Lifetime(7, chunked=True), Lifetime(30))]  # of the layers, as models have them


def new_memory(page_size=4, budget=None):
    return Memory(SHAPE.layout(CacheSettings(8, page_size)), H, SHAPE.device, budget)


class Token:
    """One token of the plain model: its key, value and expiry per layer and head."""

    def __init__(self, position, key, value):
        self.position, self.key, self.value = position, key, value  # [L, H, D]
        self.expiry = torch.full((L, H), NEVER)


class Sequences:
    """The plain model of one cache."""

    def __init__(self, cache, batch):
        self.cache, self.eviction, self.lifetimes = cache, cache.eviction, cache.shape.lifetimes
        self.tokens = [[] for _ in range(batch)]
        self.columns = []  # per column which sequences have a token there
        self.sure = 0  # columns that can be taken back whatever has expired

    def copy(self, cache):
        twin = Sequences(cache, 0)
        twin.tokens = copy.deepcopy(self.tokens)
        twin.columns, twin.sure = list(self.columns), self.sure
        return twin


def forward(plain, columns, pads, seed, fail_at=None):
    """One forward of the cache and of the plain model; `fail_at`: the layer at which it is interrupted, L: commit."""
    cache, g = plain.cache, torch.Generator().manual_seed(seed)
    B = len(plain.tokens)
    valid = torch.arange(columns) >= torch.tensor([min(p, columns) for p in pads])[:, None]
    if seed % 3 == 0 and columns > 2:
        valid[:, columns // 2] = False  # padding in the middle
    if seed % 4 == 1:
        valid = valid.flip(1)  # padding on the right
    key, value = torch.randn(2, L, B, H, columns, D, generator=g)
    marked = torch.rand(L, B, H, columns, generator=g) < 0.6
    query = torch.randn(L, B, H * G, columns, D, generator=g)
    after = copy.deepcopy(plain.tokens)
    fill(plain, after, valid, key, value, marked)
    try:
        step = cache.begin(B, columns, None if bool(valid.all()) else valid)
        outputs = []
        for layer in range(L):
            if fail_at == layer:
                raise KeyboardInterrupt
            cache.update(key[layer], value[layer], layer)
            evicts = plain.eviction is not None and not step.decides_at_commit
            step.update(layer, key[layer], value[layer], marked[layer] if evicts else None)
            outputs.append(step.attend(layer, query[layer], D**-0.5))
            step.settle(layer)
        if fail_at == L:
            raise KeyboardInterrupt
        cache.commit(marked if plain.eviction is not None and step.decides_at_commit else None)
    except KeyboardInterrupt:
        cache.abandon()
        return
    plain.tokens = after
    plain.columns += valid.T.tolist()
    plain.sure = min(cache.sequences.undo, plain.sure + columns)
    for b in range(B):
        for column in range(columns):
            if valid[b, column]:
                at = sum(row[b] for row in plain.columns) - int(valid[b, column:].sum())
                for layer in range(L):
                    expected = attention(after[b], at, layer, query[layer, b, :, column])
                    torch.testing.assert_close(outputs[layer][b, column], expected, rtol=1e-4, atol=1e-4)


def fill(plain, tokens, valid, key, value, marked):
    """Append the new tokens to the plain model and let its gates decide."""
    eviction, lifetimes = plain.eviction, plain.lifetimes
    for b, row in enumerate(tokens):
        for column in valid[b].nonzero()[:, 0].tolist():
            row.append(Token(len(row), key[:, b, :, column], value[:, b, :, column]))
            for layer, life in enumerate(lifetimes):
                at = row[-1].position
                if life is not None:
                    first = at - at % life.length if life.chunked else at
                    row[-1].expiry[layer] = first + life.length - 1
            about = len(row) - 1 - (eviction.shift if eviction else 0)
            if eviction is not None and about >= 0:
                token = row[about]
                gated = torch.where(marked[:, b, :, column], token.position + eviction.window, NEVER)
                token.expiry = torch.minimum(token.expiry, gated)


def attention(row, at, layer, query):
    """[Hq, D] by the visibility rule, from the plain model."""
    out = torch.zeros(H * G, D)
    for head in range(H):
        seen = [t for t in row if t.position <= at <= t.expiry[layer, head]]
        keys, values = (torch.stack([getattr(t, name)[layer, head] for t in seen]) for name in ("key", "value"))
        for g in range(G):
            weights = (query[head * G + g] @ keys.T * D**-0.5).softmax(-1)
            out[head * G + g] = weights @ values
    return out


def check(memory, sequences):
    """Everything held is what the plain models hold, and the pool's counts are right."""
    pool = memory.pool
    named = torch.zeros(pool.size, dtype=torch.int64)
    for plain in sequences:
        cache = plain.cache
        if not cache.rows:
            continue
        tables = cache.tables
        for b, row in enumerate(cache.rows):
            assert int(tables.position[row]) == len(plain.tokens[b])
            for layer in range(L):
                for head in range(H):
                    used = int(tables.length[row, layer, head])
                    ids = tables.table[row, layer, head, : -(-used // pool.layout.page_size)].long()
                    named += torch.bincount(ids, minlength=pool.size)
                    got = held(pool, ids, used, len(plain.tokens[b]))
                    wanted = {
                        (t.position, t.key[layer, head, 0].item(), t.value[layer, head, 0].item())
                        for t in plain.tokens[b]
                        if t.expiry[layer, head] >= len(plain.tokens[b])
                    }
                    assert got == wanted
                    check_marks(cache, row, layer, head, len(plain.tokens[b]))
    named[:2] = 1
    assert torch.equal(pool.references[: pool.size].long(), named)
    free = pool.free[: int(pool.free_count)].long()
    assert len(free.unique()) == len(free) == int((named == 0).sum())
    assert not named[free].any()
    assert not pool.raw[free].any()


def check_marks(cache, row, layer, head, now):
    """`Tables.marks` names the slot that is free for the next token; no other is, unless `State.scattered` says so."""
    tables, undo = cache.tables, cache.sequences.undo
    if tables.window is None or cache.sequences.state.scattered or now == 0:
        return
    used = int(tables.length[row, layer, head])
    ids = tables.table[row, layer, head, : -(-used // tables.pool.layout.page_size)].long()
    expiry = tables.pool.pages.expiry[ids].flatten()[:used]
    free = (expiry < max(0, now - undo)).nonzero()[:, 0].tolist()
    named = int(tables.marks[row, layer, head, (now - undo - tables.window - 1) % tables.ring])
    assert free == [named] * (named >= 0)


def held(pool, ids, used, now):
    """What the next query sees of one row: {(position, key[0], value[0])}."""
    pages = pool.pages
    position, expiry = pages.position[ids].flatten()[:used], pages.expiry[ids].flatten()[:used]
    seen = expiry >= now
    key, value = (t[ids].flatten(0, 1)[:used, 0][seen] for t in (pages.key, pages.value))
    out = list(zip(position[seen].tolist(), key.tolist(), value.tolist(), strict=True))
    assert len(out) == len(set(out))
    return set(out)


@pytest.mark.parametrize("eviction", [None, Eviction(5), Eviction(5, 1), Eviction(20, 1), Eviction(40)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), page_size=st.sampled_from([1, 3, 4, 16]), undo=st.sampled_from([0, 3, 32]))
def test_any_history_is_the_visibility_rule(eviction, seed, page_size, undo):
    any_history(SHAPE, eviction, seed, page_size, undo)


@pytest.mark.parametrize("eviction", [None, Eviction(5), Eviction(40)])
@pytest.mark.parametrize("lifetimes", WINDOWS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), page_size=st.sampled_from([1, 4]), undo=st.sampled_from([0, 3, 32]))
def test_and_so_it_is_where_layers_have_windows(lifetimes, eviction, seed, page_size, undo):
    any_history(replace(SHAPE, lifetimes=lifetimes), eviction, seed, page_size, undo)


def new(shape, eviction, memory, undo, batch):
    return Sequences(PagedCache(shape, eviction, memory, undo=undo), batch)


def any_history(shape, eviction, seed, page_size, undo):
    dice, memory = random.Random(seed), new_memory(page_size)
    sequences = []
    for _ in range(dice.randint(6, 14)):
        choice = dice.random()
        if not sequences or (choice < 0.12 and len(sequences) < 4):
            sequences.append(new(shape, eviction, memory, dice.choice([0, undo]), dice.randint(1, 3)))
        plain = dice.choice(sequences)
        if choice < 0.72 or not plain.tokens[0]:
            pads = [dice.choice([0, 0, 0, 2, 30]) for _ in plain.tokens] if dice.random() < 0.4 else [0] * 9
            fail = dice.choice([None, None, None, 0, 1, 2])
            forward(
                plain, dice.choice([1, 1, 1, 2, 4, 9, 25, 40]), pads[: len(plain.tokens)], dice.getrandbits(30), fail
            )
        elif choice < 0.8:
            crop(plain, dice.randint(1, 12))
        elif choice < 0.82 and undo:  # drafts are asked for from now on
            plain.cache.sequences.reach_back(undo)
        elif choice < 0.88 and plain.cache.rows:
            picked = [dice.randrange(len(plain.tokens)) for _ in range(dice.randint(1, 3))]
            plain.cache.batch_select_indices(torch.tensor(picked))
            plain.tokens = [copy.deepcopy(plain.tokens[i]) for i in picked]
            plain.columns = [[row[i] for i in picked] for row in plain.columns]
        elif choice < 0.94:
            sequences.append(plain.copy(copy.deepcopy(plain.cache)))
        else:
            sequences.remove(plain)
            del plain
            memory.reclaim()
        check(memory, sequences)
    for plain in sequences:
        plain.cache.reset()
    assert memory.pool.held() == memory.sequences == 0


def crop(plain, columns):
    """Take columns back where the cache can."""
    cache, columns = plain.cache, min(columns, len(plain.columns))
    if columns == 0:
        return
    try:
        cache.crop(-columns)
    except CacheStateError:
        assert columns > plain.sure
        return
    plain.sure = max(0, plain.sure - columns)
    for b, row in enumerate(plain.tokens):
        gone = sum(column[b] for column in plain.columns[-columns:])
        plain.tokens[b] = row = row[: len(row) - gone] if gone else row
        if row and plain.eviction is not None and plain.eviction.shift:
            row[-1].expiry = torch.full((L, H), NEVER)  # its decision was read at a token that is gone
    plain.columns = plain.columns[: len(plain.columns) - columns]
