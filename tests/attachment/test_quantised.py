"""Models with quantised weights: attached they answer as unattached, gates evict as under the hard mask, and what was
read under one set of weights is known from what was read under another."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from octavo import KVCache, ReuseStore, attach
from octavo.attachment import require_attachment
from octavo.attachment.identity import difference
from octavo.errors import CacheStateError
from tiny import tiny_adapter, tiny_model, tokens

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 128}


def codes(weight):
    """A matrix [out, in] as codes in int8 and one scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class CodedLinear(nn.Module):
    """A layer that holds codes and makes weights of them when it runs, as bitsandbytes' do."""

    def __init__(self, layer):
        super().__init__()
        weight, scale = codes(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


class Coded(torch.Tensor):
    """A tensor that is made of codes and scales and has no elements of its own, as torchao's are."""

    @staticmethod
    def __new__(cls, weight, scale):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=scale.dtype, device=weight.device)

    def __init__(self, weight, scale):
        self.codes, self.scale = weight, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight = args[:2]
            return nn.functional.linear(x, weight.codes * weight.scale)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} on codes")


def of_modules(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], CodedLinear(layer))
    return model


def of_tensors(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            layer.weight = nn.Parameter(Coded(*codes(layer.weight.detach())), requires_grad=False)
    return model


def torchao(kind):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

    def quantised(model):
        wanted: Any = Int8WeightOnlyConfig() if kind == "int8" else IntxWeightOnlyConfig(weight_dtype=torch.int4)
        quantize_(model, wanted)
        return model

    return quantised


KINDS = {
    "modules": lambda: of_modules,
    "tensors": lambda: of_tensors,
    "torchao int8": lambda: torchao("int8"),
    "torchao int4": lambda: torchao("int4"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_answer_as_unattached_and_evict_as_under_the_hard_mask(kind):
    whole, ids = tiny_model(**SIZES), tokens(2, 60)
    adapter = tiny_adapter(whole, window=6)  # made on the whole weights; norms tell that these are the same model
    model = KINDS[kind]()(copy.deepcopy(whole))
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected, answer = model(ids).logits, model.generate(ids, **greedy)
        assert (expected - whole(ids).logits).abs().max() > 0.01
        attach(model, chunk=16)
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        assert torch.equal(model.generate(ids, **greedy), answer)
        attach(model, adapter, chunk=16)
        hard, cache = model(ids, use_cache=False).logits, KVCache(model)
        got = [model(ids[:, :40], past_key_values=cache).logits]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    torch.testing.assert_close(torch.cat(got, 1), hard, **CLOSE)
    assert (hard - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_and_stores_know_quantised_weights(kind):
    quantise = KINDS[kind]()
    models = [quantise(tiny_model(**SIZES, seed=seed)) for seed in (0, 0, 1)]
    caches = [KVCache(attach(model)) for model in models]
    identities = [cache.identity() for cache in caches]
    assert difference(*identities[:2]) is None
    assert difference(identities[0], identities[2]) == "weights"
    ids = tokens(1, 200)
    with torch.no_grad():
        expected = models[0](ids).logits[:, -1:]
        models[0](ids[:, :-1], past_key_values=caches[0])
        taken = caches[0].snapshot()
        again = KVCache.restore(models[1], taken)
        torch.testing.assert_close(models[1](ids[:, -1:], past_key_values=again).logits, expected, **CLOSE)
        with pytest.raises(CacheStateError, match="another weights"):
            KVCache.restore(models[2], taken)
    store = ReuseStore(memory="64MiB")
    attach(models[0], reuse=store)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(models[0].generate(ids, **greedy), models[0].generate(ids, **greedy))
    assert store.stats().hits == 1


def test_codes_that_change_are_noticed():
    model = attach(of_tensors(tiny_model(**SIZES)))
    digests, decoder = require_attachment(model).digests, model.model
    before = digests.of("weights", decoder)
    decoder.layers[0].self_attn.q_proj.weight.codes[0, 0] += 1
    assert digests.of("weights", decoder) != before
    before = digests.of("weights", decoder)
    decoder.layers[0].self_attn.q_proj.weight.scale *= 2
    assert digests.of("weights", decoder) != before


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_on_a_cpu(bits, tmp_path):
    """It rounds what enters a layer, to int8 or bfloat16, so the last bits of attention grow: answers are near."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    whole, ids = tiny_model(**SIZES), tokens(2, 60)
    whole.save_pretrained(tmp_path)
    wanted = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=wanted, dtype=torch.float32, device_map={"": "cpu"}).eval()
    with torch.no_grad():
        expected = model(ids).logits
        attach(model)
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        attach(model, tiny_adapter(whole, window=6))
        hard, cache = model(ids, use_cache=False).logits, KVCache(model)
        got = [model(ids[:, :40], past_key_values=cache).logits]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
    far = (expected - hard).abs().mean()
    assert (torch.cat(got, 1) - hard).abs().mean() < 0.1 * far
    assert far > 0.1
    assert KVCache(model).identity() == cache.identity()
