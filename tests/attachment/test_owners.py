"""Whom a cache belongs to: bound DynamicCaches, copies and pickles of models, one memory, one budget."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

from octavo import KVCache, attach, detach
from octavo.attachment import require_attachment
from octavo.errors import CacheBudgetError, CacheStateError, NotAttachedError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

GREEDY = {"do_sample": False, "max_new_tokens": 4}


# A DynamicCache that stands for a KVCache


def emptied(how, model, ids):
    """A DynamicCache that an attached model has filled and that holds nothing any more."""
    past = DynamicCache(config=model.config)
    if how == "never filled":
        with pytest.raises(CacheBudgetError):
            model(tokens(400, 60), past_key_values=past)
        return past
    model(ids, past_key_values=past)
    assert past.get_seq_length() == ids.shape[1]
    if how == "reset":
        past.reset()
    elif how == "cropped":
        past.crop(-ids.shape[1])
    elif how == "emptied behind it":
        past.octavo_cache.reset()
    return past


EMPTIED = [
    (how, after)
    for how in ("reset", "cropped", "never filled", "emptied behind it")
    for after in ("attached anew", "another model", "detached")
][:-1]  # nothing tells the last to detach


@pytest.mark.parametrize(("how", "after"), EMPTIED)
@torch.no_grad()
def test_an_empty_dynamic_cache_may_go_to_any_model(how, after):
    model, ids = attach(tiny_model(), budget=2**20), tokens(1, 20)
    past = emptied(how, model, ids)
    taker = {"attached anew": lambda: attach(model), "another model": lambda: attach(tiny_model(seed=1)),
             "detached": lambda: detach(model)}[after]()  # fmt: skip
    expected = taker.generate(ids, **GREEDY)
    assert torch.equal(taker.generate(ids, past_key_values=past, **GREEDY), expected)
    assert past.get_seq_length() == 23
    assert isinstance(past, DynamicCache)


@torch.no_grad()
def test_a_filled_dynamic_cache_stays_with_its_model():
    model, ids = attach(tiny_model()), tokens(1, 20)
    past = DynamicCache()
    model(ids, past_key_values=past)
    with pytest.raises(CacheStateError, match="made for another model"):
        attach(tiny_model(seed=1))(ids, past_key_values=past)
    detach(model)
    with pytest.raises(NotAttachedError, match="only with the attached model"):
        model(ids, past_key_values=past)


@torch.no_grad()
def test_the_pages_of_a_dynamic_cache_go_back_with_it():
    model = attach(tiny_model())
    past = DynamicCache()
    model(tokens(1, 200), past_key_values=past)
    memory = past.octavo_cache.memory
    assert memory.sequences == 1
    gc.disable()
    try:
        del past
        assert memory.sequences == 0, "something refers back to it"
    finally:
        gc.enable()


# Copies and pickles


@pytest.mark.parametrize("swift", [False, True])
@torch.no_grad()
def test_a_used_attached_model_can_be_pickled(swift):
    model, ids = model_of(), tokens(1, 40)
    attach(model, pair(model, 2, True) if swift else tiny_adapter(model), chunk=16, budget=2**24)
    cache = KVCache(model)
    expected = model(ids, past_key_values=cache).logits
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids, past_key_values=KVCache(twin)).logits, expected)
    assert require_attachment(twin).settings == require_attachment(model).settings
    model.lm_head.weight.zero_()
    assert torch.equal(twin(ids).logits, expected), "the copy runs itself"
    with pytest.raises(CacheStateError, match="made for another model"):
        twin(ids, past_key_values=cache)
    looked_up = {"do_sample": False, "max_new_tokens": 4, "prompt_lookup_num_tokens": 2}
    assert torch.equal(twin.generate(ids, **looked_up), copy.deepcopy(twin).generate(ids, **looked_up))
    assert type(detach(twin).model.forward).__name__ == "method"


@torch.no_grad()
def test_caches_refuse_to_be_pickled_and_say_what_to_do():
    model, past = attach(tiny_model()), DynamicCache()
    cache = KVCache(model)
    model(tokens(1, 20), past_key_values=past)
    for each in (cache, past):
        with pytest.raises(CacheStateError, match=r"cannot be pickled: .* its snapshot\(\) gives"):
            pickle.dumps(each)


@torch.no_grad()
def test_a_copied_cache_goes_on_alone():
    model, ids = attach(tiny_model()), tokens(1, 30)
    cache = KVCache(model)
    model(ids[:, :20], past_key_values=cache)
    for twin in (copy.copy(cache), copy.deepcopy(cache)):
        got = model(ids[:, 20:], past_key_values=twin).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 20:], rtol=0, atol=1e-4)
        assert (cache.seen, twin.seen) == (20, 30)


@torch.no_grad()
def test_a_copied_model_refuses_the_caches_of_the_original():
    model, ids = attach(tiny_model()), tokens(1, 20)
    cache = KVCache(model)
    model(ids, past_key_values=cache)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    with pytest.raises(CacheStateError, match="made for another model"):
        twin(ids, past_key_values=cache)
    model(ids, past_key_values=cache)
    assert cache.seen == 40
    assert require_attachment(twin).key != require_attachment(model).key


# One memory


def test_two_threads_make_one_memory():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            model, caches, start = attach(tiny_model()), [], threading.Barrier(2)

            def make(model=model, caches=caches, start=start):
                start.wait()
                caches.append(KVCache(model))

            threads = [threading.Thread(target=make) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert caches[0].memory is caches[1].memory
    finally:
        sys.setswitchinterval(before)


@torch.no_grad()
def test_one_budget_is_not_given_twice():
    model, ids = attach(tiny_model(), budget=2**20), tokens(1, 20)
    cache, empty = KVCache(model), KVCache(model)
    model(ids, past_key_values=cache)
    model.bfloat16()
    with pytest.raises(CacheStateError, match=r"1 sequences in float32 on cpu still hold .* before .* bfloat16 on cpu"):
        KVCache(model)
    with pytest.raises(CacheStateError, match="still hold"):
        model(ids, past_key_values=empty)
    old = weakref.ref(cache.memory)
    model(ids, past_key_values=cache)  # what was filled goes on
    cache.reset()
    model(ids, past_key_values=empty)
    model(ids, past_key_values=cache)
    assert cache.memory is empty.memory is KVCache(model).memory
    assert cache.shape.dtype == torch.bfloat16
    gc.collect()
    assert old() is None
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, past_key_values=KVCache(model)).logits, expected, rtol=0, atol=0.3)


@torch.no_grad()
def test_without_a_budget_caches_of_two_dtypes_may_live_together():
    model, ids = attach(tiny_model()), tokens(1, 20)
    cache = KVCache(model)
    model(ids, past_key_values=cache)
    model.bfloat16()
    model(ids, past_key_values=KVCache(model))
    assert cache.memory is not KVCache(model).memory
