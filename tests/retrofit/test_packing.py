"""Rows are full, made of whole documents, and drawn in the shares that were asked for."""

import numpy as np
import pytest
import torch

from octavo.retrofit.data import Source
from octavo.retrofit.packing import Packer, Rows

LENGTH = 512


def chats(name: str = "chats", share: float = 1.0, first: int = 1000) -> Source:
    """400 documents of 20 to 300 tokens; document i holds only tokens `first` + i."""
    lengths = np.random.default_rng(0).integers(20, 300, 400)
    tokens = np.repeat(np.arange(400) + first, lengths).astype(np.uint16)
    ends = lengths.cumsum()
    return Source(name, tokens, np.concatenate([[0], ends[:-1]]), share, ends)


def book(share: float = 1.0) -> Source:
    return Source("book", np.arange(20_000, 60_000, dtype=np.uint16), None, share)


def documents(rows: Rows) -> list[list[torch.Tensor]]:
    """The documents of every row, in order."""
    assert rows.document is not None
    return [
        [tokens[document == d] for d in range(int(document.max()) + 1)]
        for tokens, document in zip(rows.tokens, rows.document, strict=True)
    ]


def test_rows_are_full_and_documents_whole():
    source = chats()
    rows = Packer([source], None, 0.0, LENGTH).rows(np.random.default_rng(0), 32)
    assert rows.tokens.shape == rows.positions.shape == rows.document.shape == (32, LENGTH)
    padding = 1 - rows.counted.mean().item()
    print(f"{padding:.2%} padding")
    assert padding < 0.02
    sizes = dict(zip(*np.unique(source.tokens, return_counts=True), strict=True))
    cut = 0
    for row in documents(rows):
        for tokens in row:
            assert len(set(tokens.tolist())) == 1
            cut += len(tokens) < sizes[int(tokens[0])]
    total = sum(len(row) for row in documents(rows))
    assert total > 32 * 2
    assert cut <= 32, "at most one document a row is cut"


def test_positions_begin_anew_and_padding_is_at_the_end():
    rows = Packer([chats()], None, 0.0, LENGTH).rows(np.random.default_rng(1), 8)
    for positions, document in zip(rows.positions, rows.document, strict=True):
        padded = (document < 0).nonzero().flatten()
        assert torch.equal(padded, torch.arange(LENGTH - len(padded), LENGTH))
        for d in range(int(document.max()) + 1):
            at = (document == d).nonzero().flatten()
            assert torch.equal(positions[at], torch.arange(len(at)))
            assert torch.equal(at, torch.arange(at[0], at[0] + len(at)))


def test_running_text_fills_rows_alone_and_needs_no_boundaries():
    rows = Packer([book()], None, 0.0, LENGTH).rows(np.random.default_rng(0), 4)
    assert (rows.tokens.diff(dim=1) == 1).all(), "one piece of the text"
    assert rows.counted.all()
    assert all(part.document is None for part in rows.split(2))


def test_rows_without_boundaries_come_first():
    rows = Packer([book(), chats()], None, 0.0, LENGTH).rows(np.random.default_rng(0), 16)
    boundaries = [part.document is not None for part in rows.split(1)]
    assert boundaries == sorted(boundaries)
    assert 2 < sum(boundaries) < 14


def test_shares_are_shares_of_tokens(tokenizer):
    few, many = chats(share=1.0), book(share=3.0)
    packer = Packer([many, few], tokenizer, 0.25, LENGTH)
    counts = np.zeros(3)  # book, chats, recall
    for step in range(6):
        rows = packer.rows(np.random.default_rng(step), 32)
        for row in documents(rows):
            for tokens in row:
                kind = 1 if len(set(tokens.tolist())) == 1 else 0 if bool((tokens.diff() == 1).all()) else 2
                counts[kind] += len(tokens)
    assert counts / counts.sum() == pytest.approx([0.75 * 0.75, 0.75 * 0.25, 0.25], abs=0.06)


def test_draws_depend_on_the_seed_alone():
    packer = Packer([book(), chats()], None, 0.0, LENGTH)
    one, same, other = (packer.rows(np.random.default_rng(seed), 8) for seed in (3, 3, 4))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.document, same.document)
    assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("length", [1, 2, 17, 63])
def test_any_length_is_filled(length):
    rows = Packer([chats(), book()], None, 0.0, length).rows(np.random.default_rng(0), 3)
    assert rows.tokens.shape == (3, length)
    assert rows.counted.all()
