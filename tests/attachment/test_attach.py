"""Attached equals unattached where nothing is evicted, `detach` leaves no trace, and what cannot work is refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    GraniteConfig,
    MambaConfig,
    MoshiConfig,
    Olmo2Config,
    Phi3Config,
    StaticCache,
    pipeline,
)

from octavo import KVCache, attach, detach
from octavo.attachment import attachment_of
from octavo.attachment.attach import restore
from octavo.errors import (
    AdapterMismatchError,
    CacheStateError,
    ConfigError,
    NotAttachedError,
    PromptError,
    UnsupportedModelError,
)
from tiny import FAMILIES, SHAPE, tiny_adapter, tiny_model, tokens


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, **options)


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_token_for_token_the_same(family, chunk):
    model, ids = tiny_model(family), tokens(1, 40)
    expected = generate(model, ids)
    assert torch.equal(generate(attach(model, chunk=chunk), ids), expected)
    assert torch.equal(generate(model, ids, past_key_values=KVCache(model)), expected)
    assert torch.equal(generate(model, ids, past_key_values=DynamicCache(config=model.config)), expected)


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_is_token_for_token_the_same(family, chunk):
    model, ids = tiny_model(family), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[2, :31] = 0
    expected = generate(model, ids, mask)
    assert torch.equal(generate(attach(model, chunk=chunk), ids, mask), expected)


def test_generate_with_eviction_follows_the_masked_forward():
    """Greedy tokens chosen step by step from forwards without a cache are what `generate` gives."""
    model, ids = tiny_model(), tokens(1, 60)
    attach(model, tiny_adapter(model), chunk=16)
    got = generate(model, ids)
    for i in range(60, got.shape[1]):
        with torch.no_grad():
            assert got[0, i] == model(got[:, :i], use_cache=False).logits[0, -1].argmax()


@pytest.mark.parametrize("evict", [False, True])
def test_beam_search_and_sampling_run_on_the_cache(evict):
    model, ids = tiny_model(), tokens(2, 30)
    beams = generate(model, ids, num_beams=3)
    attach(model, tiny_adapter(model, window=8) if evict else None)
    got = generate(model, ids, num_beams=3)
    assert got.shape == beams.shape
    assert evict or torch.equal(got, beams)
    torch.manual_seed(0)
    assert model.generate(ids, do_sample=True, num_return_sequences=2, max_new_tokens=5).shape == (4, 35)


def test_assisted_generation_crops_the_cache():
    model, ids = tiny_model(), tokens(1, 30)
    expected = generate(model, ids)
    attach(model)
    assert torch.equal(generate(model, ids, assistant_model=tiny_model(num_hidden_layers=2)), expected)


def test_pipeline_works(smollm):
    model, tokenizer = smollm
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = write("The capital of France is", **options)
    attach(model)
    try:
        assert write("The capital of France is", **options) == expected
    finally:
        detach(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_default_model_is_token_for_token_the_same(smollm, batch):
    model, tokenizer = smollm
    texts = ["The lighthouse keeper counted the ships.", "Once", "It was a bright cold day in April, and the clocks"]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts[:batch], return_tensors="pt", padding=True)
    options = {"do_sample": False, "max_new_tokens": 24}
    expected = model.generate(**inputs, **options)
    attach(model)
    try:
        assert torch.equal(model.generate(**inputs, **options), expected)
    finally:
        detach(model)


def test_detach_leaves_no_trace():
    model, ids = tiny_model(), tokens(1, 20)
    before = (
        dict(model.__dict__),
        dict(model.model.__dict__),
        model.config._attn_implementation,
        list(model.state_dict()),
    )
    expected = generate(model, ids)
    attach(model, tiny_adapter(model))
    assert attachment_of(model) is not None
    assert detach(model) is model
    after = (
        dict(model.__dict__),
        dict(model.model.__dict__),
        model.config._attn_implementation,
        list(model.state_dict()),
    )
    assert before[0].keys() == after[0].keys()
    assert before[1].keys() == after[1].keys()
    assert before[2:] == after[2:]
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert torch.equal(generate(model, ids), expected)
    with pytest.raises(NotAttachedError, match="attach"):
        detach(model)


def test_restore_puts_back_the_adapter_and_every_setting():
    model = tiny_model()
    attach(model, tiny_adapter(model), chunk=9, page_size=3, budget=10**6)
    before = attachment_of(model)
    attach(model)
    restore(model, before)
    after = attachment_of(model)
    assert (after.adapter, after.settings) == (before.adapter, before.settings)
    restore(model, None)
    assert attachment_of(model) is None


def test_two_attached_models_do_not_meet():
    one, two, ids = tiny_model(), tiny_model("qwen3", seed=3), tokens(1, 60)
    attach(one, tiny_adapter(one), chunk=16)
    alone = generate(one, ids)
    attach(two)
    generate(two, ids)
    assert torch.equal(generate(one, ids), alone)
    detach(two)
    assert torch.equal(generate(one, ids), alone)


def test_positional_arguments_tuples_and_hidden_states():
    model, ids = tiny_model(), tokens(2, 50)
    with torch.no_grad():
        expected = model.model(ids, output_hidden_states=True)
        attach(model, chunk=16)
        got = model.model(ids, output_hidden_states=True)
        first, cache = model.model(ids, return_dict=False)[:2]
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=0, atol=2e-5)
    torch.testing.assert_close(first, expected.last_hidden_state, rtol=0, atol=2e-5)
    assert isinstance(cache, KVCache)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_inputs_embeds_are_chunked_like_tokens():
    model, ids = tiny_model(), tokens(1, 50)
    attach(model, tiny_adapter(model), chunk=16)
    with torch.no_grad():
        expected = model(ids).logits
        got = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_the_unattached_model_s(use_cache):
    """Fine-tuning an attached model is exact, also where a cache is made on the way and the input is long."""
    model, ids = tiny_model(), tokens(2, 70)
    model(ids, labels=ids, use_cache=use_cache).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    attach(model, chunk=16)
    model(ids, labels=ids, use_cache=use_cache).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [GraniteConfig, Olmo2Config, Phi3Config])
def test_models_that_share_the_attention_interface(kind):
    model, ids = small(kind).eval(), tokens(2, 40)
    expected = generate(model, ids)
    assert torch.equal(generate(attach(model, chunk=16), ids), expected)
    attach(model, tiny_adapter(model, window=8), chunk=16)
    assert generate(model, ids).shape == expected.shape


def small(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SHAPE, **changes}))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=50, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )


def deepseek():
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return small(DeepseekV3Config, moe_intermediate_size=16, first_k_dense_replace=1, **heads, **latent, **experts)


REFUSED = {
    "encoder-decoder": bart,
    "latent attention": deepseek,
    "both directions": lambda: small(Gemma3TextConfig, head_dim=16, use_bidirectional_attention=True),
    "attention interface": lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
    "a window that its masks do not have|attention interface": lambda: small(MoshiConfig, sliding_window=8),
    "no past_key_values": lambda: small(MambaConfig),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_without_the_seams_are_refused_by_name(reason):
    model = REFUSED[reason]()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        attach(model)
    assert type(model).__name__ in str(caught.value)
    assert attachment_of(model) is None


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("use_cache", [False, True])
def test_masks_of_three_dimensions_are_refused(use_cache):
    model, ids = attach(tiny_model()), tokens(1, 6)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="3-D"):
        model(ids, attention_mask=torch.ones(1, 6, 6), use_cache=use_cache)


def test_bad_calls_are_refused_clearly():
    model = attach(tiny_model())
    ids = tokens(1, 30)
    with torch.no_grad():
        with pytest.raises(PromptError, match="empty"):
            model(ids[:, :0])
        with pytest.raises(PromptError, match="1,024 positions"):
            model(tokens(1, 1025))
        with pytest.raises(UnsupportedModelError, match="4-D"):
            model(ids, attention_mask=torch.zeros(1, 1, 30, 30))
        with pytest.raises(CacheStateError, match="StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_an_adapter_of_another_model_is_refused_and_nothing_changes():
    model = tiny_model()
    other = tiny_adapter(tiny_model(seed=5, num_attention_heads=6))
    wide = tiny_model("qwen3")
    attach(model)
    mine = attachment_of(model)
    with pytest.raises(AdapterMismatchError, match="model_type"):
        attach(model, tiny_adapter(wide))
    with torch.no_grad():
        other.fingerprint["norms"][:] = [2.0] * len(other.fingerprint["norms"])
    with pytest.raises(AdapterMismatchError, match="other weights"):
        attach(model, other)
    with pytest.raises(ConfigError, match="chunk"):
        attach(model, chunk=0)
    assert attachment_of(model) is mine


def test_bf16_model_keeps_bf16_pages():
    model = tiny_model().to(torch.bfloat16)
    attach(model, tiny_adapter(model), chunk=16)
    cache = KVCache(model)
    with torch.no_grad():
        got = model(tokens(1, 90), past_key_values=cache).logits
        expected = model(tokens(1, 90), use_cache=False).logits
    assert cache.memory.pool.pages.key.dtype == torch.bfloat16
    # A decision near the threshold may fall either way in bf16; the logits stay close on the whole.
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()
