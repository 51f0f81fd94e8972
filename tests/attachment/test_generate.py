"""What `generate` may be given: padding on the right, drafts of its own, one cache turn after turn."""

import copy

import pytest
import torch
from transformers import DynamicCache

from octavo import KVCache, attach, detach
from octavo.errors import CacheStateError, NotAttachedError
from tiny import FAMILIES, tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.mark.parametrize("length", [4, 9, 40])  # one decode step, one short chunk, several
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_gives_what_the_unattached_model_gives(family, length):
    """Its first new token follows a padding column, whose query sees all real tokens before it."""
    model, ids = tiny_model(family), tokens(3, length)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    mask[1, 1:] = 0
    with torch.no_grad():
        logits, answer = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, **GREEDY)
        attach(model, chunk=16)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), answer)


@pytest.mark.parametrize("exit_at", [1, 2, 3, 5])  # before, at and behind SwiftKV's first layer, inside a group
@pytest.mark.parametrize("group", [None, 1, 2])
def test_drafts_by_an_early_exit_are_exact(exit_at, group):
    model, ids = model_of(), tokens(1, 30)
    attach(model, pair(model, group, False) if group else None, chunk=16)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_early_exit=exit_at, **GREEDY), expected)
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("swift", [False, True])
def test_drafts_whose_rejection_needs_evicted_tokens_are_refused(swift):
    model, ids = model_of(), tokens(1, 30)
    attach(model, pair(model, 1, True, window=4) if swift else tiny_adapter(model, window=4), undo=0)
    expected = model.generate(ids, **GREEDY)
    with pytest.raises(CacheStateError, match=r"undo=0 can take no draft back.*undo=N"):
        model.generate(ids, assistant_early_exit=3, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("evict", [False, True])
def test_one_dynamic_cache_serves_turn_after_turn_and_so_do_its_copies(evict):
    model, ids = tiny_model(), tokens(1, 60)
    attach(model, tiny_adapter(model, window=8) if evict else None, chunk=16)
    past, text = DynamicCache(config=model.config), ids[:, :20]
    for turn in range(4):
        answer = model.generate(text, past_key_values=past, **GREEDY)
        assert torch.equal(answer, model.generate(text, **GREEDY))
        assert past.get_seq_length() == answer.shape[1] - 1
        text = torch.cat([answer, ids[:, 20 + 5 * turn : 25 + 5 * turn]], 1)
        twin, held = copy.deepcopy(past), past.get_seq_length()
        assert torch.equal(model.generate(text, past_key_values=twin, **GREEDY), model.generate(text, **GREEDY))
        assert (twin.get_seq_length(), past.get_seq_length()) == (text.shape[1] + 7, held)
    if evict:
        with pytest.raises(CacheStateError, match="already evicted"):
            past.crop(-3)
        return
    past.crop(-3)
    assert past.get_seq_length() == held - 3
    text = torch.cat([answer[:, : held - 3], ids[:, 50:]], 1)
    assert torch.equal(model.generate(text, past_key_values=past, **GREEDY), model.generate(text, **GREEDY))


def test_a_dynamic_cache_on_pages_is_refused_by_a_model_that_is_not_attached():
    model, ids = attach(tiny_model()), tokens(1, 30)
    past = DynamicCache(config=model.config)
    answer = model.generate(ids, past_key_values=past, **GREEDY)
    detach(model)
    with pytest.raises(NotAttachedError, match="only with the attached model"):
        model.generate(answer, past_key_values=past, **GREEDY)
    attach(model)
    with pytest.raises(CacheStateError, match="made for another model"):
        model.generate(answer, past_key_values=past, **GREEDY)
    assert model.generate(answer, past_key_values=KVCache(model), **GREEDY).shape[1] == answer.shape[1] + 8
