"""Every operation on a batch, interrupted at every line of page memory's code: it has happened or it has not.

The cache then holds what it held or what it was to hold, goes on from there, and in the end no page and no row is lost.
"""

import copy
import gc

import pytest
import torch
from test_interrupts import Interrupts
from test_steps import SHAPE, D, H, L, Sequences, check, forward, new_memory

from octavo.config import Eviction
from octavo.kv import PagedCache


class First(Interrupts):
    """Interrupts when a line of the room `kv` runs for the n-th time of those that have not run before."""

    def __init__(self, n=None):
        self.n, self.lines = n, set()

    def due(self, frame):
        at = frame.f_code, frame.f_lineno
        fresh = at not in self.lines
        self.lines.add(at)
        return fresh and len(self.lines) == self.n


def prepared(eviction, count=1):
    """A memory and batches of two sequences that have read 6 tokens each."""
    memory, made = new_memory(4), []
    for i in range(count):
        plain = Sequences(PagedCache(SHAPE, eviction, memory), 2)
        for j, n in enumerate((5, 1)):
            forward(plain, n, [0, 0], 36 + 9 * i + 3 * j)
        made.append(plain)
    return memory, made


def crop(memory, plains):
    plains[0].cache.crop(-1)


def cropped(plain):
    for row in plain.tokens:
        row.pop()
        if plain.eviction and plain.eviction.shift:
            row[-1].expiry = torch.full((L, H), 2**31 - 1)
    plain.columns.pop()


def select(memory, plains):
    plains[0].cache.batch_select_indices(torch.tensor([1, 1, 0]))


def selected(plain):
    plain.tokens = [copy.deepcopy(plain.tokens[i]) for i in (1, 1, 0)]
    plain.columns = [[row[i] for i in (1, 1, 0)] for row in plain.columns]


def leave(memory, plains):
    plains[0].cache.leave([0])


def left(plain):
    plain.tokens.pop(0)
    plain.columns = [row[1:] for row in plain.columns]


def abandon(memory, plains):
    cache, new = plains[0].cache, torch.ones(2, H, 1, D)
    step = cache.begin(2, 1, None)
    for layer in range(L):
        cache.update(new, new, layer)
        step.update(layer, new, new)
    cache.abandon()


def fork(memory, plains):
    copy.deepcopy(plains[0].cache)


def reset(memory, plains):
    plains[0].cache.reset()


def ended(plain):
    plain.tokens, plain.columns = [[] for _ in plain.tokens], []


def reclaim(memory, plains):
    del plains[1:]
    memory.reclaim()


OPERATIONS = {  # what runs, what it does to the plain model, and which tell whether it has happened
    "crop": (crop, cropped, lambda c: c.seen == 5),
    "select": (select, selected, lambda c: len(c.rows) == 3),
    "leave": (leave, left, lambda c: len(c.rows) == 1),
    "abandon": (abandon, None, lambda c: False),
    "fork": (fork, None, lambda c: False),
    "reset": (reset, ended, lambda c: not c.rows),
    "reclaim": (reclaim, None, lambda c: False),
}


@pytest.fixture
def _collected_quickly():
    """What there is before a test is left out of collections, of which it asks for hundreds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_collected_quickly")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_interrupted_at_any_line_has_happened_or_has_not(name):
    eviction = Eviction(30, 1)
    run, change, happened = OPERATIONS[name]
    n, done = 0, False
    while not done:
        n += 1
        memory, plains = prepared(eviction, 2 if name == "reclaim" else 1)
        try:
            with First(n):
                run(memory, plains)
            done = True
        except KeyboardInterrupt:
            pass
        plain = plains[0]
        del plains[1:]
        if name in ("fork", "reclaim"):
            gc.collect()  # the interrupt's traceback may hold the copy
        if change is not None and happened(plain.cache):
            change(plain)
        forward(plain, 1, [0] * len(plain.tokens), 8)  # whatever is pending is finished first
        check(memory, [plain])
        plain.cache.reset()
        assert (memory.sequences, memory.pool.held()) == (0, 0)
    assert n > 20


def test_a_join_interrupted_at_any_line_has_happened_or_has_not():
    n, done = 0, False
    while not done:
        n += 1
        memory, (one, two) = prepared(Eviction(6, 1), 2)
        try:
            with First(n):
                one.cache.join(two.cache)
            done = True
        except KeyboardInterrupt:
            pass
        if len(one.cache.rows) == 4:
            assert not two.cache.rows
            one.tokens, one.columns = (
                one.tokens + two.tokens,
                [a + b for a, b in zip(one.columns, two.columns, strict=True)],
            )
            ended(two)
        for plain in (one, two):
            forward(plain, 1, [0] * len(plain.tokens), 8)
        check(memory, [one, two])
        one.cache.reset()
        two.cache.reset()
        assert (memory.sequences, memory.pool.held()) == (0, 0)


@pytest.mark.parametrize("columns", [1, 30])
def test_a_first_forward_interrupted_at_any_line_leaves_nothing(columns):
    n, plain = 0, None
    while plain is None or not plain.cache.seen:
        n += 1
        memory = new_memory(4)
        plain = Sequences(PagedCache(SHAPE, Eviction(6), memory), 4)
        with First(n):
            forward(plain, columns, [0] * 4, 6)  # abandons where it was interrupted
        if plain.cache.seen:
            break
        narrow = Sequences(plain.cache, 1)
        forward(narrow, 5, [0], 8)  # of another batch than the one that was interrupted
        check(memory, [narrow])
        plain.cache.reset()
        assert (memory.sequences, memory.pool.held()) == (0, 0)
    assert n > 40


def test_tables_that_cannot_grow_are_as_they_were(monkeypatch):
    memory, (plain,) = prepared(None)
    real, calls = torch.Tensor.new_zeros, []

    def failing(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory for a page table")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", failing)
        with pytest.raises(torch.OutOfMemoryError, match="page table"):
            plain.cache.tables.join(3)
    forward(plain, 3, [0, 0], 8)
    other = Sequences(PagedCache(SHAPE, None, memory), 5)
    forward(other, 3, [0] * 5, 8)
    check(memory, [plain, other])


def test_an_error_of_a_forward_is_not_hidden_by_one_while_it_is_taken_back(monkeypatch):
    memory, (plain,) = prepared(Eviction(6, 1))
    cache, new = plain.cache, torch.ones(2, H, 1, D)
    with monkeypatch.context() as patch:
        patch.setattr("octavo.kv.sequences.rewind", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        cache.begin(2, 1, None).update(0, new, new)
        cache.abandon()
    assert cache.seen == 6
    assert cache.position.tolist() == [5, 5]  # one column is padding
    forward(plain, 1, [0, 0], 8)
    check(memory, [plain])
