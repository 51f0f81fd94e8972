"""What Octavo would silently ignore, or fail at in the middle, is refused by name and at once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffLlamaConfig

from octavo import attach, detach
from octavo.attachment import attachment_of
from octavo.attachment.forward import NAME
from octavo.errors import CacheStateError, UnsupportedModelError
from tiny import FAMILIES, SHAPE, tiny_adapter, tiny_model, tokens

GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.mark.parametrize("use_cache", [False, True])
def test_another_attention_chosen_after_attach_does_not_switch_the_gates_off(use_cache):
    model, ids = tiny_model(), tokens(1, 30)
    attach(model, tiny_adapter(model, window=4))
    with torch.no_grad():
        expected = model(ids, use_cache=use_cache).logits
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match="set to 'eager' after"):
            model(ids, use_cache=use_cache)
        model.set_attn_implementation(NAME)
        assert torch.equal(model(ids, use_cache=use_cache).logits, expected)
    assert detach(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("asked", ["call", "config", "generate", "generation_config"])
def test_attention_weights_are_refused_however_they_are_asked_for(asked, use_cache):
    model, ids = tiny_model(), tokens(1, 20)
    model.set_attn_implementation("eager")
    if asked == "config":
        model.config.output_attentions = True
    if asked == "generation_config":
        model.generation_config.update(output_attentions=True, return_dict_in_generate=True)
    attach(model)
    weights = {"output_attentions": True}
    run = {
        "call": lambda: model(ids, use_cache=use_cache, **weights),
        "config": lambda: model(ids, use_cache=use_cache),
        "generate": lambda: model.generate(ids, use_cache=use_cache, return_dict_in_generate=True, **weights, **GREEDY),
        "generation_config": lambda: model.generate(ids, use_cache=use_cache, **GREEDY),
    }[asked]
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="attention weights are not computed"):
        run()


NO_STREAM = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="transformers makes a CUDA stream for it, and this PyTorch for CUDA finds no GPU",
)


@pytest.mark.parametrize("kind", ["static", pytest.param("offloaded_static", marks=NO_STREAM)])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_a_fixed_length_are_refused_in_every_family(family, kind):
    model = attach(tiny_model(family))
    with pytest.raises(CacheStateError, match=r"StaticCache; pass octavo.KVCache\(model\)"):
        model.generate(tokens(1, 20), cache_implementation=kind, **GREEDY)


def test_masks_made_beforehand_are_refused():
    model = attach(tiny_model())
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="2-D padding mask"):
        model(tokens(1, 20), attention_mask={"full_attention": torch.ones(1, 1, 20, 20)})


def test_differential_attention_is_refused_at_attach():
    model = AutoModelForCausalLM.from_config(DiffLlamaConfig(**SHAPE))
    with pytest.raises(UnsupportedModelError, match="differential attention, which attends twice"):
        attach(model)
    assert attachment_of(model) is None


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_layer_that_attends_twice_is_refused_when_it_does(use_cache):
    """Whatever `attach` does not know by name."""
    model = attach(tiny_model())
    attention = model.model.layers[1].self_attn
    once = attention.forward

    def twice(hidden_states, **kwargs):
        once(hidden_states, **kwargs)
        return once(hidden_states, **{**kwargs, "past_key_values": None})

    attention.forward = twice
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="LlamaAttention attends more than once"):
        model(tokens(1, 20), use_cache=use_cache)
