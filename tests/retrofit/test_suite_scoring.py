"""What the long suite scores is what a real cache gives; texts that are none are refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo import KVCache, attach, detach
from octavo.dms import HardGates
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.readout import readout
from octavo.retrofit.suite import Case, CaseSet, read_suite_text
from octavo.retrofit.suite.cases import Asked, Context, laid_out
from octavo.retrofit.suite.scoring import score
from tiny import tiny_adapter

LENGTH = 120


def cases(count=3):
    drawn = np.random.default_rng(1).integers(5, 49000, (count, LENGTH))
    spans = [(40, 43), (90, 91), (100, 120)]
    return CaseSet.of("random", "exact", [Case(ids, spans[: i + 1]) for i, ids in enumerate(drawn)])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("batch_tokens", [1, 2 * LENGTH])
def test_scores_are_those_of_a_cache_that_evicts(student, shift, batch_tokens):
    adapter = tiny_adapter(student, window=16, shift=shift, rate=0.8)
    given = cases()
    attach(student, adapter)
    try:
        scores = score(student, readout(student), HardGates(adapter.gates), None, given, batch_tokens)
        dense = score(student, readout(student), None, None, given, batch_tokens)
        for i, spans in enumerate(given.spans):
            logits, cache = read_by_tokens(student, given.ids[i])
            at = torch.cat([torch.arange(a, b) for a, b in spans])
            gold = given.ids[i][at]
            expected = F.cross_entropy(logits[at - 1], gold)
            assert scores.nll[i] == pytest.approx(expected.item(), rel=1e-4)
            right = logits.argmax(-1)
            assert scores.exact[i] == [bool((right[a - 1 : b - 1] == given.ids[i][a:b]).all()) for a, b in spans]
            assert scores.likeliest[i] == int((right[at - 1] == gold).sum())
            assert scores.counted[i] == len(at)
            assert cache.kept.float().mean() < LENGTH
    finally:
        detach(student)
    assert dense.kept is None
    assert 16 < scores.kept < LENGTH
    assert not np.allclose(scores.nll, dense.nll, rtol=1e-6), "the gates must matter"


def read_by_tokens(model, ids):
    """Logits [T, V] of one sequence read token by token through a cache, and the cache."""
    cache = KVCache(model)
    with torch.no_grad():
        rows = [model(token.view(1, 1), past_key_values=cache).logits[0, 0] for token in ids]
    return torch.stack(rows), cache


def test_short_and_unprintable_texts_are_refused(tmp_path, tokenizer):
    short, bytes_ = tmp_path / "a.txt", tmp_path / "b.txt"
    short.write_text("Call me Ishmael.")
    bytes_.write_text("".join(map(chr, np.random.default_rng(0).integers(1, 9, 20000))))
    with pytest.raises(TextFileError, match="token"):
        read_suite_text(short, tokenizer, 2048)
    with pytest.raises(TextFileError, match="is no text"):
        read_suite_text(bytes_, tokenizer, 2048)


def test_a_context_without_room_is_refused(tokenizer):
    context = Context([(0.5, "The code of the gate is 4711.")], [Asked("What is the code?", "It is", (" 4711.",))])
    case = laid_out(tokenizer, context, lambda n: np.full(n, 100), 256)
    ((first, last),) = case.spans
    assert len(case.ids) == 256
    assert tokenizer.decode(case.ids[first:last]) == " 4711."
    with pytest.raises(ConfigError, match="too short"):
        laid_out(tokenizer, context, lambda n: np.full(n, 100), 20)
