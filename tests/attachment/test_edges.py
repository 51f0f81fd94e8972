"""What a model can be asked for besides plain generation: attached answers as unattached, or is refused."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForSequenceClassification,
    MixtralConfig,
    Phi3Config,
)

from octavo import KVCache, attach, detach
from octavo.attachment import fill
from octavo.errors import CacheBudgetError, CacheStateError, NotAttachedError, UnsupportedModelError
from tiny import SHAPE, tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair


def test_a_dynamic_cache_handed_over_turn_after_turn_goes_on():
    model, ids = attach(tiny_model()), tokens(1, 50)
    cache, kept = DynamicCache(config=model.config), KVCache(model)
    options = {"do_sample": False, "max_new_tokens": 5}
    for past in (cache, kept):
        first = model.generate(ids[:, :20], past_key_values=past, **options)
        turn = torch.cat([first, ids[:, 20:]], 1)
        second = model.generate(turn, past_key_values=past, **options)
        assert past.get_seq_length() == second.shape[1] - 1
        if past is cache:
            expected = second
    assert torch.equal(second, expected)
    assert torch.equal(second, detach(model).generate(turn, **options))


@pytest.mark.parametrize("swift", [False, True])
def test_gradients_reach_the_input_of_a_frozen_model_across_chunks(swift):
    model, ids, found = model_of().requires_grad_(False), tokens(1, 60), []
    attach(model, pair(model, 1, False) if swift else None, chunk=16)
    for use_cache in (False, True):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=use_cache).logits[:, -1].sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[1], found[0])
    assert found[0][:, :40].norm() > 1


def test_a_deep_copy_of_an_attached_model_runs_its_own_weights():
    model, ids = model_of(), tokens(1, 20)
    attach(model, pair(model, 2, True))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(ids).logits.any()
        assert not detach(twin)(ids).logits.any()
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("rope", [None, "longrope"])
def test_rope_that_depends_on_the_length_sees_the_whole_prompt(rope):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 30}
    parameters = (
        {"rope_type": rope, "rope_theta": 1e4, **factors} if rope else {"rope_type": "default", "rope_theta": 1e4}
    )
    torch.manual_seed(0)
    config = Phi3Config(**SHAPE, rope_parameters=parameters, original_max_position_embeddings=30)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(1, 60)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(attach(model, chunk=16)(ids).logits, expected, rtol=0, atol=1e-4)


def test_weights_follow_a_cast_whatever_ran_first():
    model, ids = model_of().bfloat16(), tokens(1, 40)
    attach(model, pair(model, 1, False))
    model.float()
    with torch.no_grad():
        cached = model(ids, past_key_values=KVCache(model)).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, cached, rtol=0, atol=1e-4)


@pytest.mark.parametrize("evict", [False, True])
def test_what_was_filled_in_inference_mode_goes_on_outside_it(evict):
    model, ids = model_of(), tokens(1, 60)
    with torch.inference_mode():
        attach(model, pair(model, 2, evict), chunk=16)
        cache = KVCache(model)
        model(ids[:, :40], past_key_values=cache)
    with torch.no_grad():
        got = model(ids[:, 40:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    model(ids, labels=ids, use_cache=False).loss.backward()
    cache.crop(-1) if not evict else cache.batch_select_indices(torch.tensor([0, 0]))


def test_tuples_and_routers_keep_every_chunk():
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None)).eval()
    options = {"attention_mask": mask, "output_router_logits": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(ids, labels=ids, **options)
        got = attach(model, chunk=16)(ids, labels=ids, **options)
        torch.testing.assert_close(got.loss, expected.loss)
        for name in ("router_logits", "hidden_states"):
            torch.testing.assert_close(
                [t.view(2, 50, -1)[mask.bool()] for t in getattr(got, name)],
                [t.view(2, 50, -1)[mask.bool()] for t in getattr(expected, name)],
                rtol=0, atol=1e-4,
            )  # fmt: skip
        plain = model.model(ids, output_hidden_states=True, return_dict=False)
        assert [h.shape for h in plain[2]] == [(2, 50, 96)] * 4


def test_gradient_checkpointing_trains_without_a_cache():
    model, ids = tiny_model().train(), tokens(1, 30)
    attach(model)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_dtypes_that_the_kernels_do_not_know_take_the_torch_path():
    ids = tokens(1, 30)
    model = tiny_model().double()
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(ids, **options)
    assert torch.equal(attach(model).generate(ids, **options), expected)
    model = attach(tiny_model())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids, **options).shape == (1, 38)


def test_a_decoder_is_attached_once():
    model = attach(tiny_model())
    with pytest.raises(UnsupportedModelError, match="another attached model"):
        attach(model.model)
    other = type(model)(detach(model).config).eval()  # one configuration for two
    attach(model)
    with pytest.raises(NotAttachedError, match="shares its configuration"), torch.no_grad():
        other(tokens(1, 5))


def test_models_without_logits_to_keep_get_all_tokens():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(model_of().config).eval()
    attach(model, pair(model, 1, False))
    with torch.no_grad():
        expected = model(tokens(1, 20)).logits
        assert torch.equal(model(tokens(1, 20), logits_to_keep=1).logits, expected)


def test_fill_skips_whether_gradients_are_on_or_not():
    model, cache = model_of(), None
    attach(model, pair(model, 1, False))
    cache, ran = KVCache(model), []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda *a: ran.append(1))
    fill(model, tokens(1, 100), cache)
    hook.remove()
    assert (ran, cache.seen) == ([], 100)


# Caches


def test_removing_padding_removes_no_tokens():
    model, ids, mask = tiny_model(), tokens(2, 40), torch.ones(2, 35, dtype=torch.long)
    mask[1, 25:30] = 0
    mask[1, 30:] = 0
    attach(model, chunk=8)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        assert cache.position.tolist() == [30, 25]
        cache.crop(-5)
        assert cache.position.tolist() == [25, 25]
        got = model(ids[:, 30:], past_key_values=cache).logits
        for row in range(2):
            alone = torch.cat([ids[row, :25], ids[row, 30:]])[None]
            torch.testing.assert_close(got[row], model(alone).logits[0, 25:], rtol=0, atol=1e-4)


def test_a_mask_cannot_hide_what_is_cached():
    model, ids, mask = attach(tiny_model()), tokens(1, 40), torch.ones(1, 40, dtype=torch.long)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        mask[0, :10] = 0
        with pytest.raises(CacheStateError, match="disagrees"):
            model(ids[:, 30:], attention_mask=mask, past_key_values=cache)
        mask[:] = 1
        model(ids[:, 30:], attention_mask=mask, past_key_values=cache)
    assert cache.seen == 40


@pytest.mark.parametrize("shift", [0, 1])
def test_a_cache_of_padding_alone_can_be_cropped(shift):
    model = tiny_model()
    attach(model, tiny_adapter(model, shift=shift))
    cache, mask = KVCache(model), torch.tensor([[0] * 5 + [1] * 3])
    with torch.no_grad():
        model(tokens(1, 8), attention_mask=mask, past_key_values=cache)
        cache.crop(-4)
        cache.crop(-1)
        got = model(tokens(1, 6), past_key_values=cache).logits
        torch.testing.assert_close(got, model(tokens(1, 6)).logits, rtol=0, atol=1e-4)


def test_forwards_over_the_budget_change_no_expiry():
    model, ids = tiny_model(), tokens(1, 80)
    attach(model, tiny_adapter(model, shift=1, window=8), page_size=1)
    free, bound = KVCache(model), KVCache(model)
    with torch.no_grad():
        for cache in (free, bound):
            model(ids[:, :40], past_key_values=cache)
        bound.sequences.quota.budget = bound.nbytes
        failed = 0
        for start in range(30):
            try:
                model(ids[:, start : start + 3], past_key_values=bound)
            except CacheBudgetError:
                failed += 1
            else:
                pytest.fail("the budget held three more tokens")
        bound.sequences.quota.budget = None
        expected = model(ids[:, 40:], past_key_values=free).logits
        torch.testing.assert_close(model(ids[:, 40:], past_key_values=bound).logits, expected, rtol=0, atol=1e-4)
    assert failed == 30


def test_a_prompt_over_the_budget_leaves_no_part_of_it():
    model, ids = attach(tiny_model(), chunk=16), tokens(1, 200)
    one = KVCache(model)
    with torch.no_grad():
        model(ids[:, :128], past_key_values=one)
        cache = KVCache(model, budget=one.nbytes)
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(CacheBudgetError):
            model(ids[:, 20:], past_key_values=cache)
        assert cache.seen == 20
        got = model(ids[:, 20:30], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids[:, :30]).logits[:, 20:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 512])
def test_shifted_marks_are_read_at_the_next_real_token(chunk):
    model, ids = tiny_model(), tokens(1, 100)
    attach(model, tiny_adapter(model, shift=1), chunk=chunk)
    mask, positions = torch.ones(1, 103, dtype=torch.long), torch.arange(100)[None]
    mask[0, 50:53] = 0  # padding between turns
    padded = torch.cat([ids[:, :50], tokens(1, 3, seed=4), ids[:, 50:]], 1)
    places = torch.cat([positions[:, :50], positions[:, 50:53], positions[:, 50:]], 1)
    with torch.no_grad():
        expected = model(ids, past_key_values=KVCache(model)).logits
        got = model(padded, attention_mask=mask, position_ids=places, past_key_values=KVCache(model)).logits
    torch.testing.assert_close(got[:, mask[0].bool()], expected, rtol=0, atol=1e-4)
