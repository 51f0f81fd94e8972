"""What fails is undone: forwards that a cache could not hold, joins that broke off, attachments that were replaced."""

import numpy as np
import pytest
import torch

from octavo import KVCache, attach
from octavo.attachment import attachment_of
from octavo.attachment.attach import restore
from octavo.attachment.attachment import Attachment
from octavo.errors import CacheBudgetError
from octavo.retrofit.evaluate import EvaluationSettings, evaluate
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair


@pytest.mark.parametrize("length", [3, 80])
@pytest.mark.parametrize("bound", ["this cache", "all caches"])
def test_a_batch_over_the_budget_leaves_the_cache_open_to_a_smaller_one(bound, length):
    """Both kinds of step: three tokens run as a decode step, eighty as chunks."""
    model, pages = tiny_model(), {"page_size": 1, "chunk": 16}
    attach(model, **pages, budget=2**20 if bound == "all caches" else None)
    cache = KVCache(model, budget=None if bound == "all caches" else 60_000)
    many = {("this cache", 80): 4, ("this cache", 3): 60, ("all caches", 80): 60, ("all caches", 3): 700}
    with torch.no_grad():
        with pytest.raises(CacheBudgetError):
            model(tokens(many[bound, length], length), past_key_values=cache)
        assert (cache.seen, len(cache.rows), cache.is_initialized) == (0, 0, False)
        got = model(tokens(1, 5), past_key_values=cache).logits
        torch.testing.assert_close(got, model(tokens(1, 5), use_cache=False).logits, rtol=0, atol=1e-4)


def state(model):
    """All that joining may touch."""
    modules = [(m.__dict__.get("forward"), dict(m._forward_pre_hooks)) for m in model.modules()]
    return attachment_of(model), model.config._attn_implementation, set(model.__dict__), modules


def breaking(whole, after):
    """The same function, which fails when it has run for the `after`-th time."""
    calls = 0

    def run(*args, **kwargs):
        nonlocal calls
        whole(*args, **kwargs)
        calls += 1
        if calls == after:
            raise MemoryError

    return run


LATE = {
    "the attention function": (Attachment, "_replace", 1),
    "the first layer": (Attachment, "_replace", 2),
    "the last layer": (Attachment, "_replace", 13),
    "everything": (Attachment, "join", 1),
}


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("step", LATE)
def test_a_join_that_breaks_off_leaves_the_model_unattached(monkeypatch, step, swift):
    model, ids = model_of(), tokens(1, 20)
    adapters, before = pair(model, 1, False) if swift else None, state(model)
    with torch.no_grad():
        expected = model(ids).logits
        owner, name, after = LATE[step]
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name), after))
        with pytest.raises(MemoryError):
            attach(model, adapters)
        assert state(model) == before
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("step", LATE)
def test_a_join_that_breaks_off_leaves_the_earlier_attachment_and_its_caches(monkeypatch, step):
    model, ids = model_of(), tokens(1, 60)
    attach(model, pair(model, 2, True), chunk=16)
    cache, earlier = KVCache(model), attachment_of(model)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        owner, name, after = LATE[step]
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name), after))
        with pytest.raises(MemoryError):
            attach(model)
        assert attachment_of(model) is earlier
        got = model(ids[:, 40:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["restore", "evaluate"])
def test_caches_that_were_filled_before_go_on(how):
    model, ids = tiny_model(), tokens(1, 60)
    attach(model, tiny_adapter(model), chunk=16)
    cache, before = KVCache(model), attachment_of(model)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        if how == "restore":
            attach(model)
            restore(model, before)
        else:
            text = np.random.default_rng(0).integers(2, 97, 400).astype(np.uint16)
            settings = EvaluationSettings(nll_length=120, nll_from=20, texts=1, lengths=(), baselines=False)
            evaluate(model, None, text, [tiny_adapter(model, window=8)], settings)
        assert attachment_of(model) is before
        got = model(ids[:, 40:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
