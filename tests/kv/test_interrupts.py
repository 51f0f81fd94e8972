"""A forward that is interrupted at any line of page memory's code leaves the cache as it was, and loses no page."""

import copy
import random
import sys
from pathlib import Path

import pytest
import torch
from test_steps import SHAPE, Sequences, check, forward, new_memory

import octavo.kv
from octavo.config import Eviction
from octavo.kv import PagedCache

ROOM = str(Path(octavo.kv.__file__).parent)


class Interrupts:
    """Raises KeyboardInterrupt before the line of the room `kv` of which `due` says so."""

    left_out = ()  # functions that are never interrupted

    def due(self, frame):
        raise NotImplementedError

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(ROOM) or frame.f_code.co_name in self.left_out:
            return None
        if event == "line" and self.due(frame):
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *args):
        sys.settrace(None)


class InterruptAt(Interrupts):
    """Interrupts when the n-th line is about to run; counts lines."""

    left_out = ("abandon", "rewind", "mend")

    def __init__(self, line=None):
        self.line, self.count = line, 0

    def due(self, frame):
        self.count += 1
        return self.count == self.line


def prepared(eviction, shared):
    """A memory with one batch that has read 22 tokens, and if `shared` a second one that shares its pages."""
    memory = new_memory(4)
    memory.pool._grow(500)  # growing would make the first run longer than the others
    plain = Sequences(PagedCache(SHAPE, eviction, memory), 2)
    for i, n in enumerate((20, 1, 1)):
        forward(plain, n, [0, 0], 3 * i + 1)
    return memory, [plain, plain.copy(copy.deepcopy(plain.cache))] if shared else [plain]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 30])
@pytest.mark.parametrize("eviction", [Eviction(6), Eviction(6, 1)])
def test_an_interrupt_anywhere_leaves_the_cache_as_it_was(eviction, columns, shared):
    memory, sequences = prepared(eviction, shared)
    plain = sequences[0]
    _, others = prepared(eviction, shared)
    with InterruptAt() as whole:
        forward(others[0], columns, [0, 0], 7)
    lines = random.Random(columns).sample(range(1, whole.count * 9 // 10), 50)
    for count, line in enumerate(sorted(lines)):
        with InterruptAt(line):
            forward(plain, columns, [0, 0], 7)
        check(memory, sequences)
        if plain.cache.seen != 22:  # pages that are the sequence's own since the first interrupt need fewer lines
            assert count > 40
            break
    else:
        forward(plain, columns, [0, 0], 7)
    forward(plain, 1, [0, 0], 8)
    check(memory, sequences)


def test_an_interrupted_first_forward_leaves_an_empty_cache():
    memory = new_memory(4)
    for line in range(1, 200, 9):
        plain = Sequences(PagedCache(SHAPE, Eviction(6), memory), 4)
        with InterruptAt(line):
            forward(plain, 30, [0] * 4, 7)
        if plain.cache.seen:
            break
        assert memory.pool.held() == 0
        narrow = Sequences(plain.cache, 1)
        forward(narrow, 5, [0], 8)  # of another batch than the one that was interrupted
        check(memory, [narrow])
        plain.cache.reset()
    assert torch.equal(memory.pool.references[: memory.pool.size].bool().nonzero()[:, 0], torch.tensor([0, 1]))
