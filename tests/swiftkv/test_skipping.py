"""Skipping prefill is the full SwiftKV forward, and switching SwiftKV off is the base model."""

import copy

import pytest
import torch
from transformers import DynamicCache

from octavo import KVCache, attach, detach, set_swiftkv
from octavo.attachment import attachment_of, fill
from octavo.errors import AdapterMismatchError, CacheStateError, ConfigError, NotAttachedError
from octavo.swiftkv import initial
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import LAYERS, SWIFT_FAMILIES, full, gates_for, model_of, pair, swiftkv_for


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_skipping_prefill_and_decode_equal_the_full_forward(chunk, group, evict, before):
    model, ids = model_of(), tokens(2, 230)
    base = full(model, ids)
    attach(model, pair(model, group, evict, before=before), chunk=chunk)
    expected = full(model, ids)
    assert (expected - base).abs().max() > 0.1, "SwiftKV must matter for this test to mean anything"
    cache = KVCache(model)
    with torch.no_grad():
        parts = [model(ids[:, :200], past_key_values=cache, logits_to_keep=3).logits[:, -3:]]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(200, 230)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 197:], rtol=0, atol=1e-4)
    layers = 2 + 4 // group
    assert cache.kept.shape[1] == layers
    handed = cache.tables.visible(cache.sequences.index)[:, layers:]
    assert handed.shape[1] == (before > 0), "what tokens hand on has a KV layer of its own"
    assert bool((handed == (20 if evict else 230)).all())
    if evict:
        marked = torch.stack(attachment_of(model).policy.marked)
        stays = (~marked | (torch.arange(230) >= 210)).sum(-1).transpose(0, 1)
        assert torch.equal(cache.kept, stays), "what the cache holds is what the gates keep"


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("family", SWIFT_FAMILIES)
def test_every_family_skips_exactly(family, shift, before):
    model, ids = model_of(family), tokens(1, 150)
    attach(model, pair(model, 2, True, shift=shift, before=before), chunk=32)
    expected = full(model, ids)
    cache = KVCache(model)
    with torch.no_grad():
        fill(model, ids[:, :100], cache)
        parts = [model(ids[:, 100:140], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, 150)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 100:], rtol=0, atol=1e-4)


def test_qwen2_biases_count():
    model, ids = model_of("qwen2"), tokens(1, 90)
    swift = swiftkv_for(model)
    assert swift.transform.q_bias is not None
    attach(model, swift)
    first = full(model, ids)
    with torch.no_grad():
        swift.transform.kv_bias.add_(1.0)
    attach(model, swift)
    assert (full(model, ids) - first).abs().max() > 1e-3


def count_layers(model):
    """How many tokens went through each layer's MLP."""
    seen = [0] * LAYERS
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, seen[i] + out.shape[1]))
    return seen


@pytest.mark.parametrize(("chunk", "later"), [(512, 3), (70, 3), (64, 8 + 2)])
def test_prompt_tokens_do_not_run_the_later_layers(chunk, later):
    """The last chunk of eight tokens is too short to narrow."""
    model, ids = model_of(), tokens(1, 200)
    attach(model, swiftkv_for(model), chunk=chunk)
    seen = count_layers(model)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert seen == [202, 202, later, later, later, later]


@pytest.mark.parametrize("ask", ["labels", "hidden states", "all logits", "indices", "no cache", "gradients"])
def test_whoever_needs_all_positions_gets_the_full_forward(ask):
    model, ids = model_of(), tokens(1, 200)
    attach(model, swiftkv_for(model), chunk=64)
    expected = full(model, ids)
    seen = count_layers(model)
    options = {
        "labels": {"labels": ids},
        "hidden states": {"output_hidden_states": True, "logits_to_keep": 1},
        "all logits": {},
        "indices": {"logits_to_keep": torch.tensor([5, 199])},
        "no cache": {"use_cache": False, "logits_to_keep": 1},
        "gradients": {"logits_to_keep": 1},
    }[ask]
    with torch.set_grad_enabled(ask == "gradients"):
        out = model(ids, **options)
    assert seen == [200] * LAYERS
    wanted = {"indices": [5, 199], "no cache": [199], "gradients": [199], "hidden states": [199]}.get(ask, range(200))
    torch.testing.assert_close(out.logits, expected[:, list(wanted)], rtol=0, atol=1e-4)
    if ask == "hidden states":
        assert [h.shape[1] for h in out.hidden_states] == [200] * (LAYERS + 1)
    if ask == "gradients":
        out.logits.sum().backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("chunk", [16, 512])
def test_left_padded_generation_equals_each_prompt_alone(chunk, evict, before):
    model, ids = model_of(), tokens(3, 170)
    attach(model, pair(model, 2, evict, before=before), chunk=chunk)
    mask = torch.ones_like(ids)
    for row, length in enumerate((170, 101, 30)):
        mask[row, : 170 - length] = 0
    got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)[:, 170:]
    for row, length in enumerate((170, 101, 30)):
        alone = ids[row : row + 1, 170 - length :]
        seq = torch.cat([alone, got[row : row + 1]], 1)
        logits = full(model, seq)[0, length - 1 : -1]
        assert torch.equal(logits.argmax(-1), got[row]), f"prompt of {length}"


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("evict", [False, True])
def test_multi_turn_equals_one_forward(evict, before):
    model, ids = model_of(), tokens(1, 400)
    attach(model, pair(model, 4, evict, before=before), chunk=48)
    expected = full(model, ids)
    cache, at, got = KVCache(model), 0, {}
    with torch.no_grad():
        for length in (120, 1, 1, 90, 1, 80, 70):
            at += length
            got[at] = model(ids[:, at - length : at], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for at, logits in got.items():
        torch.testing.assert_close(logits, expected[:, at - 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_layers_of_a_group_share_their_bytes(group):
    model, ids = model_of(), tokens(1, 320)
    held = {}
    for g in (1, group):
        attach(model, swiftkv_for(model, group=g))
        cache = KVCache(model)
        with torch.no_grad():
            fill(model, ids, cache)
        pages = 2 * 320 // 16  # of one KV layer: two heads
        held[g] = cache.memory.pool.held() - 2 * pages  # of the grouped layers
        assert cache.kept.sum() == 320 * 2 * (2 + 4 // g)
    assert held[1] == held[group] * group


@pytest.mark.parametrize("family", SWIFT_FAMILIES)
def test_switched_off_is_the_base_model_to_the_bit(family):
    model, ids = model_of(family), tokens(2, 130)
    expected = full(model, ids)
    attach(model)
    cached = prefill(model, ids)
    attach(model, pair(model, 2, True), chunk=512)
    assert not torch.equal(full(model, ids), expected)
    set_swiftkv(model, False)
    assert torch.equal(full(model, ids), expected)
    assert torch.equal(prefill(model, ids), cached)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False, swiftkv=False).logits, expected)
        assert not torch.equal(model(ids, use_cache=False, swiftkv=True).logits, expected)
    set_swiftkv(model, True)
    assert not torch.equal(full(model, ids), expected)
    detach(model)
    assert torch.equal(full(model, ids), expected)


def prefill(model, ids):
    with torch.no_grad():
        return model(ids, past_key_values=KVCache(model), logits_to_keep=1).logits


def test_modes_are_chosen_per_request_and_never_mix_in_one_cache():
    model, ids = model_of(), tokens(1, 100)
    attach(model, pair(model, 2, True))
    student = full(model, ids)[:, -1]
    teacher = full(model, ids, swiftkv=False)[:, -1]
    with torch.no_grad():
        for mode, expected in ((True, student), (False, teacher)):
            cache = KVCache(model, swiftkv=mode)
            got = model(ids, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
            before = copy.deepcopy(cache.kept)
            with pytest.raises(CacheStateError, match="SwiftKV"):
                model(ids[:, :1], past_key_values=cache, swiftkv=not mode)
            assert torch.equal(cache.kept, before)
            model(ids[:, :1], past_key_values=cache)  # a fixed cache goes on in its mode
        free = KVCache(model)
        set_swiftkv(model, False)
        torch.testing.assert_close(model(ids, past_key_values=free).logits[:, -1], teacher, rtol=0, atol=1e-4)
        set_swiftkv(model, True)
        with pytest.raises(CacheStateError, match="without SwiftKV"):
            model(ids, past_key_values=free)
        free.reset()
        torch.testing.assert_close(model(ids, past_key_values=free).logits[:, -1], student, rtol=0, atol=1e-4)
        empty = DynamicCache(config=model.config)
        got = model(ids, past_key_values=empty, swiftkv=False).logits[:, -1]
        torch.testing.assert_close(got, teacher, rtol=0, atol=1e-4)


def test_the_transform_follows_a_model_that_is_cast():
    model, ids = model_of(), tokens(1, 90)
    attach(model, pair(model, 2, True))
    expected = full(model, ids)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for got in (full(model, ids), model(ids, past_key_values=KVCache(model)).logits):
            assert got.dtype == torch.bfloat16
            assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_beam_search_and_batches_run_with_shared_kv_layers():
    model, ids = model_of(), tokens(2, 120)
    attach(model, pair(model, 4, True))
    got = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
    assert got.shape == (2, 126)
    detach(model)
    attach(model, pair(model, 4, False))
    draft = tiny_model(num_hidden_layers=2)
    one = model.generate(ids[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=12, do_sample=False, assistant_model=draft), one)


def test_what_cannot_be_joined_is_refused_and_nothing_changes():
    model = model_of()
    swift = swiftkv_for(model)
    gates = gates_for(model, swift.transform)
    attach(model)
    mine = attachment_of(model)
    with pytest.raises(AdapterMismatchError, match="distilled without SwiftKV"):
        attach(model, [swift, tiny_adapter(model)])
    with pytest.raises(AdapterMismatchError, match="attach both"):
        attach(model, gates)
    with pytest.raises(AdapterMismatchError, match="another SwiftKV"):
        attach(model, [swiftkv_for(model, seed=12), gates])
    with pytest.raises(AdapterMismatchError, match="another SwiftKV"):
        attach(model, [swiftkv_for(model, group=2), gates])
    with pytest.raises(ConfigError, match="two SwiftKV"):
        attach(model, [swift, swift])
    with pytest.raises(AdapterMismatchError, match="num_hidden_layers"):
        attach(model, swiftkv_for(tiny_model(num_hidden_layers=8, layer_types=["full_attention"] * 8)))
    with pytest.raises(ConfigError, match="no SwiftKV adapter"):
        set_swiftkv(model, True)
    with pytest.raises(ConfigError, match="no SwiftKV adapter"):
        KVCache(model, swiftkv=True)
    with pytest.raises(ConfigError, match=r"1\.\.5"):
        initial(model, 6)
    with pytest.raises(ConfigError, match=r"1\.\.5"):
        initial(model, 0)
    with pytest.raises(ConfigError, match="divide"):
        initial(model, 3, group=2)
    with pytest.raises(ConfigError, match="layers 2 to 5 would share keys"):
        initial(model_of("smollm3"), 2, group=4)
    assert attachment_of(model) is mine
    detach(model)
    with pytest.raises(NotAttachedError):
        set_swiftkv(model, False)
