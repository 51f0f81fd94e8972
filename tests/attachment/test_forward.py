"""What a forward holds while it runs, and when gates decide."""

import weakref

import pytest
import torch

from octavo import KVCache, attach
from octavo.dms import FoldedGates
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_chunk_keeps_no_hidden_states_of_earlier_layers(use_cache, swift):
    model, seen, alive = model_of(), [], []
    attach(model, pair(model, 1, True) if swift else tiny_adapter(model), chunk=64)

    def look(module, args, kwargs):
        alive.append([i for i, earlier in enumerate(seen) if earlier() is not None])
        seen.append(weakref.ref(kwargs["hidden_states"]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(tokens(2, 60), use_cache=use_cache)
    assert alive == [[]] * 6


@pytest.mark.parametrize("swift", [False, True])
def test_chunks_decide_per_layer_and_decode_steps_once_for_all(monkeypatch, swift):
    model, calls = model_of(), []
    attach(model, pair(model, 2, True) if swift else tiny_adapter(model), chunk=512)
    decide = FoldedGates.marked
    monkeypatch.setattr(
        FoldedGates, "marked", lambda self, first, hidden: calls.append(len(hidden)) or decide(self, first, hidden)
    )
    cache = KVCache(model)
    with torch.no_grad():
        model(tokens(1, 60), past_key_values=cache)
        assert calls == ([1, 1, 2] if swift else [1] * 6)
        calls.clear()
        model(tokens(1, 1), past_key_values=cache)
        assert calls == ([4] if swift else [6])


def test_a_model_without_gates_decides_nothing():
    model = attach(tiny_model())
    cache = KVCache(model)
    with torch.no_grad():
        model(tokens(1, 60), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
    assert cache.kept.unique().tolist() == [61]
