"""Sequences that join and leave one batch, and chains over one prompt, against a cache of their own for each."""

import random

import pytest
import torch

from octavo import KVCache, attach
from octavo.attachment import require_attachment
from octavo.errors import CacheStateError
from tiny import tiny_adapter, tiny_model, tokens


class Alone:
    """One sequence: its tokens, and the logits that it was given in the batch, by position."""

    def __init__(self, ids):
        self.ids, self.logits = ids, {}

    def check(self, model):
        """The same tokens read by a cache of their own give the same logits."""
        with torch.no_grad():
            expected = model(torch.tensor([self.ids]), past_key_values=KVCache(model)).logits[0]
        for position, logits in self.logits.items():
            torch.testing.assert_close(logits, expected[position], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("evict", "shift"), [(True, 0), (True, 1), (False, 0)])
def test_sequences_join_and_leave_at_random(evict, shift):
    model, dice = tiny_model(), random.Random(shift)
    budget = 6 * 2**20
    attach(model, tiny_adapter(model, window=9, shift=shift) if evict else None, budget=budget)
    batch, held, started = KVCache(model), [], 0
    pool, peak = batch.memory.pool, 0
    with torch.no_grad():
        for step in range(2000):
            if started < 64 and (not held or dice.random() < 0.05):
                alone, cache = Alone(tokens(1, dice.randint(2, 60), seed=started)[0].tolist()), KVCache(model)
                alone.logits[len(alone.ids) - 1] = model(
                    torch.tensor([alone.ids]), past_key_values=cache, logits_to_keep=1
                ).logits[0, -1]
                batch.join(cache)
                assert cache.rows == ()
                held.append(alone)
                started += 1
            leaving = {i for i, each in enumerate(held) if dice.random() < 0.004 or len(each.ids) > 300}
            batch.leave(leaving)
            for i in sorted(leaving, reverse=True):
                held.pop(i).check(model)
            if held:
                fed = torch.randint(0, 97, (len(held), 1), generator=torch.Generator().manual_seed(step))
                out = model(fed, position_ids=batch.position[:, None].long(), past_key_values=batch).logits[:, -1]
                for alone, token, logits in zip(held, fed[:, 0].tolist(), out, strict=True):
                    alone.ids.append(token)
                    alone.logits[len(alone.ids) - 1] = logits
            peak = max(peak, pool.nbytes)
        batch.leave(range(len(held)))
        for alone in held:
            alone.check(model)
    assert started == 64
    assert peak <= budget
    batch.memory.trim(0)
    assert (batch.memory.sequences, pool.held()) == (0, 0)
    assert not pool.raw[2 : pool.size].any()


@pytest.mark.parametrize("shift", [0, 1])
def test_chains_over_one_prompt_share_its_pages(shift):
    model = tiny_model(max_position_embeddings=8192)
    attach(model, tiny_adapter(model, window=40, shift=shift))
    ids = tokens(1, 4000)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        separate = [KVCache(model) for _ in range(8)]
        for one in separate:
            model(ids, past_key_values=one, logits_to_keep=1)
        single = cache.nbytes
        cache.batch_repeat_interleave(8)
        assert cache.nbytes <= 1.15 * single
        fed = torch.randint(0, 97, (60, 8, 1), generator=torch.Generator().manual_seed(1))
        fed[:20] = fed[:20, :1]  # the same for all, then their own
        for each in fed:
            got = model(each, past_key_values=cache).logits
            for i, one in enumerate(separate):
                expected = model(each[i : i + 1], past_key_values=one).logits
                torch.testing.assert_close(got[i : i + 1], expected, rtol=0, atol=1e-4)
    assert cache.nbytes < sum(one.nbytes for one in separate) / 3


def test_what_cannot_join_is_refused_and_nothing_changes():
    model, other = tiny_model(), tiny_model()
    attach(model)
    attach(other)
    cache, foreign = KVCache(model), KVCache(other)
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
        other(tokens(1, 5), past_key_values=foreign)
        with pytest.raises(CacheStateError, match="one attached model"):
            cache.join(foreign)
        with pytest.raises(CacheStateError, match="its own"):
            cache.join(cache)
        assert (cache.seen, len(cache.rows), foreign.seen, len(foreign.rows)) == (5, 1, 5, 1)
        model(tokens(1, 5), past_key_values=cache)
    assert require_attachment(model).memory(cache.shape).sequences == 1
