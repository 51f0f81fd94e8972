"""What `attach` refuses before anything is made: settings that cannot be, and what its trial of a model finds out."""

import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, NemotronConfig, StableLmConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from octavo import LLM, KVCache, ReuseStore, SamplingParams, attach, detach
from octavo.attachment import attachment_of, require_attachment
from octavo.attachment.supported import check_supported
from octavo.errors import AdapterMismatchError, CacheBudgetError, CacheStateError, ConfigError, UnsupportedModelError
from tiny import SHAPE, tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

WRONG = {
    "budget": [0, -1, 1.5, 10**19, 2**70, 1e30, float("inf"), float("nan"), "1GB", True, [1]],
    "page_size": [0, -4, 2.5, 10**12, "16", True, float("nan")],
    "chunk": [0, -1, 0.5, 2**40, "512", False],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value}" for name, value in CASES])
def test_a_setting_that_cannot_be_is_refused_at_attach(name, value):
    model = tiny_model()
    with pytest.raises(ConfigError, match=rf"{name} must be a whole number of \w+ from 1 to [\d,]+, not"):
        attach(model, **{name: value})
    assert attachment_of(model) is None


@pytest.mark.parametrize("budget", [1, 1000, 10**5])
def test_a_budget_that_holds_no_page_is_refused_at_attach(budget):
    model = tiny_model()
    with pytest.raises(ConfigError, match=f"a budget of {budget:,} bytes holds no page; at least [0-9,]+ are needed"):
        attach(model, budget=budget)
    assert attachment_of(model) is None


def test_whole_floats_are_numbers():
    model = attach(tiny_model(), budget=1e9, page_size=8.0, chunk=16.0)
    settings = require_attachment(model).settings
    assert [settings.budget, settings.page_size, settings.chunk] == [10**9, 8, 16]
    assert {type(n) for n in (settings.budget, settings.page_size, settings.chunk)} == {int}
    with torch.no_grad():
        model(tokens(1, 40), past_key_values=KVCache(model, budget=1e6))
    assert require_attachment(attach(model, budget=np.float64(2e9))).settings.budget == 2 * 10**9


@pytest.mark.parametrize("budget", [0, -5, 1.5, "x", True])
def test_a_cache_s_own_budget_is_checked_alike(budget):
    model = attach(tiny_model())
    with pytest.raises(ConfigError, match="budget must be a whole number of bytes"):
        KVCache(model, budget=budget)
    with pytest.raises(CacheBudgetError), torch.no_grad():
        model(tokens(1, 5), past_key_values=KVCache(model, budget=1))


# Layers that drop what a forward is told


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("config", [StableLmConfig, NemotronConfig])
def test_layers_that_pass_nothing_on_are_told_by_their_call(config):
    """Beside each other too, in threads of their own."""
    model, other, ids = random_model(config(**SHAPE)), random_model(config(**SHAPE)), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        attach(model, tiny_adapter(model, window=8), chunk=16)
        attach(other, chunk=16)
        hard = model(ids, use_cache=False).logits
        with ThreadPoolExecutor(2) as pool:
            got = list(
                pool.map(lambda m: torch.no_grad()(m)(ids, past_key_values=KVCache(m)).logits, [model, other] * 3)
            )
        for evicted, whole in zip(got[::2], got[1::2], strict=True):
            torch.testing.assert_close(evicted, hard, rtol=0, atol=1e-4)
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
        assert torch.equal(detach(model)(ids).logits, expected)
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    model.train().gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing is not supported for"):
        attach(model)(ids, labels=ids)


class Deaf(LlamaDecoderLayer):
    """A layer of somebody's own."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return super().forward(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask)


class Strict(LlamaDecoderLayer):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None):
        return super().forward(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Deaf, "attends to other keys than those"), (Strict, "Strict.forward.. got an unexpected")]
)
def test_it_is_found_whatever_the_model_s_name(kind, reason):
    model = tiny_model()
    assert isinstance(model, LlamaForCausalLM)
    model.model.layers[0].__class__ = kind
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model)


def test_the_trial_changes_nothing():
    model, ids = tiny_model(attention_dropout=0.5).train(), tokens(1, 20)
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, *a: ran.append(module.training))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    attach(model)
    assert (ran, torch.equal(torch.get_rng_state(), before)) == ([False], True)
    assert all(module.training for module in model.modules())
    model.eval()(ids, labels=ids).loss.backward()


# Weights that are elsewhere


def offloaded(model, where, folder):
    """The model, whose weights come from memory, a folder or, for some layers, from a folder while they are used."""
    cpu = torch.device("cpu")
    if where == "memory":
        return accelerate.cpu_offload(model, cpu)
    if where == "disk":
        return accelerate.disk_offload(model, folder, cpu)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    parts |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("where", ["memory", "disk", "some on disk"])
def test_an_offloaded_model_answers_as_it_does_whole(where, tmp_path):
    model, ids, greedy = tiny_model(), tokens(2, 40), {"do_sample": False, "max_new_tokens": 8}
    adapter = tiny_adapter(model, window=6)
    with torch.no_grad():
        expected, answer = model(ids).logits, model.generate(ids, **greedy)
        hard = attach(model, adapter)(ids, use_cache=False).logits
        model = offloaded(detach(model), where, tmp_path)
        assert any(p.is_meta for p in model.parameters())
        attach(model, chunk=16)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(model.generate(ids, **greedy), answer)
        (out,) = LLM(model, tokenizer=None).generate([ids[0].tolist()], SamplingParams(temperature=0.0, max_tokens=8))
        assert out.tokens == answer[0, 40:].tolist()
        attach(model, adapter, chunk=16)  # whose fingerprint is looked for where the norm's weight is
        cache = KVCache(model)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, hard, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(ids, use_cache=False).logits, hard, rtol=0, atol=1e-4)
        with pytest.raises(CacheStateError, match="weights of this model are offloaded"):
            cache.snapshot()
        other = tiny_adapter(tiny_model())
        other.fingerprint["norms"] = [2.0] * len(other.fingerprint["norms"])
        with pytest.raises(AdapterMismatchError, match="other weights"):
            attach(model, other)
        detach(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)


def test_what_reads_weights_itself_is_refused_for_an_offloaded_model():
    whole = model_of()
    adapter, model = pair(whole, 1, False), accelerate.cpu_offload(whole, torch.device("cpu"))
    for asked in ({"adapter": adapter}, {"reuse": ReuseStore(memory="1MiB")}):
        with pytest.raises(UnsupportedModelError, match="is offloaded: its weights come to cpu only while"):
            attach(model, **asked)
        assert attachment_of(model) is None
    with pytest.raises(UnsupportedModelError, match="load it whole to train"):
        check_supported(model)


def test_a_model_that_is_offloaded_afterwards_is_refused_where_it_would_need_pages():
    model, ids = attach(tiny_model()), tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        accelerate.cpu_offload(model, torch.device("cpu"))
        with pytest.raises(CacheStateError, match=r"were offloaded after octavo.attach"):
            model(ids)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)


def test_models_whose_weights_are_still_on_one_device_are_attached_whatever_hooks_they_have():
    model, ids = tiny_model(), tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        adapter = tiny_adapter(model)
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
        torch.testing.assert_close(attach(model)(ids).logits, expected, rtol=0, atol=1e-4)
        assert KVCache(attach(model, adapter)).eviction is not None
        later, _ = accelerate.cpu_offload_with_hook(tiny_model(), torch.device("cpu"))
        torch.testing.assert_close(attach(later)(ids).logits, expected, rtol=0, atol=1e-4)


def test_a_model_without_weights_is_attached_and_loaded_later():
    whole, ids = tiny_model(), tokens(1, 20)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(whole.config)).eval()
    attach(model)
    with pytest.raises(CacheStateError, match="lies on the meta device: its weights are not loaded"):
        model(ids.to("meta"))
    with pytest.raises(UnsupportedModelError, match="load its weights first, or attach it without"):
        attach(model, tiny_adapter(whole))
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    model.model.rotary_emb.__init__(whole.config)  # whose frequencies are in no checkpoint
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
