"""Queries, keys and values as one product are what they were, and the model's parameters stay its own."""

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from octavo.attachment import compiled as compiled_code
from octavo.attachment.projections import GATED, NAMES, computed_once, gated_as_one, shared_products
from tiny import attention_of, tiny_model, tokens


def nobody(module):
    return False


def products(model, replaced=nobody):
    return list(shared_products(attention_of(model), replaced))


def blocks(model):
    """For each layer, in how many blocks of memory its three weights lie."""
    return [len({getattr(a, n).weight.untyped_storage().data_ptr() for n in NAMES}) for a in attention_of(model)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_three_products_are_one(family, tmp_path):
    model = tiny_model(family)
    before, named = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    assert blocks(model) == [3] * len(model.model.layers)
    found = products(model)
    assert len(found) == 3 * len(model.model.layers)
    assert blocks(model) == [1] * len(model.model.layers)
    x = torch.randn(2, 5, model.config.hidden_size)
    for module, taken in found:
        torch.testing.assert_close(taken(x), module(x), atol=1e-6, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter is named[name]
        assert torch.equal(parameter, before[name])
    addresses = [p.data_ptr() for p in model.parameters()]
    products(model)  # they lie there already
    assert [p.data_ptr() for p in model.parameters()] == addresses
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())


def test_weights_that_change_in_place_are_seen():
    model = tiny_model()
    (query, taken), (_, _), (value, taken_value) = products(model)[:3]
    x = torch.randn(1, 4, model.config.hidden_size)
    with torch.no_grad():
        value.weight.mul_(2.0)
        taken(x)
        torch.testing.assert_close(taken_value(x), value(x), atol=1e-6, rtol=1e-5)
        query.weight.data = torch.zeros_like(query.weight)  # elsewhere now, so the block is another
    products(model)
    assert blocks(model)[0] == 1
    assert not query(x).any()


def test_another_order_and_another_input_are_computed_alone():
    model = tiny_model("qwen2")
    (_, first), (key, second), (value, third) = products(model)[:3]
    x, y = torch.randn(2, 1, 3, model.config.hidden_size)
    for order in ([second, third], [first, third, second], [first, first, second, third]):
        for taken in order:
            taken(x)
    first(x)
    torch.testing.assert_close(second(y), key(y), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(third(x), value(x), atol=1e-6, rtol=1e-5)


def test_models_can_be_trained_after_an_answer_in_inference_mode():
    model = tiny_model()
    with torch.inference_mode():
        assert len(products(model)) == 3 * len(model.model.layers)
    model(tokens(1, 9), use_cache=False).logits.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)
    with torch.inference_mode():
        model = tiny_model()
        assert products(model) == []


@pytest.mark.parametrize("where", ["flat buffer", "shared by processes"])
def test_weights_in_memory_of_others_stay_there(where):
    model = tiny_model("qwen2")  # whose biases lie between
    if where == "flat buffer":
        flat, at = torch.cat([p.detach().flatten() for p in model.parameters()]), 0
        for parameter in model.parameters():
            parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
    else:
        model.share_memory()
    addresses = [p.data_ptr() for p in model.parameters()]
    assert products(model) == []
    assert [p.data_ptr() for p in model.parameters()] == addresses


class Marked(nn.Linear):
    """A linear module of another class, as adapters make them."""


def test_what_is_no_plain_product_is_left_alone():
    model = tiny_model()
    layers = attention_of(model)
    layers[0].q_proj.register_forward_hook(lambda *args: None)
    assert len(products(model)) == 3 * (len(layers) - 1)
    model = tiny_model()
    layers = attention_of(model)
    layers[1].k_proj.__class__ = Marked
    assert len(products(model)) == 3 * (len(layers) - 1)
    model = tiny_model()
    layers = attention_of(model)
    assert len(products(model, lambda module: module is layers[0].v_proj)) == 3 * (len(layers) - 1)
    layers[1].v_proj.to(torch.bfloat16)
    assert len(products(model)) == 3 * (len(layers) - 1)
    layers[0].v_proj.weight = layers[0].k_proj.weight
    assert len(products(model)) == 3 * (len(layers) - 2)
    assert list(shared_products([nn.Identity()], nobody)) == []


def test_threads_that_share_them_do_not_mix_their_inputs():
    model = tiny_model()
    three, wrong = products(model)[:3], []
    inputs = [torch.randn(1, 7, model.config.hidden_size) for _ in range(4)]
    expected = [[module(x) for module, _ in three] for x in inputs]

    def run(which):
        for _ in range(300):
            for (_, taken), wanted in zip(three, expected[which], strict=True):
                if not torch.allclose(taken(inputs[which]), wanted, atol=1e-5):
                    wrong.append(which)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_they_are_used_where_pieces_are_compiled_and_gone_afterwards(monkeypatch):
    monkeypatch.setattr(compiled_code, "_compiled", lambda function, dynamic: function)
    model, ids = tiny_model(), tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with compiled_code.compiled(model.model, attention_of(model)):
            assert all("forward" in getattr(a, n).__dict__ for a in attention_of(model) for n in NAMES)
            got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_an_interrupt_of_any_call_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(compiled_code, "_compiled", lambda function, dynamic: function)
    model, rotary = tiny_model(num_hidden_layers=1), modeling_llama.apply_rotary_pos_emb
    left, lines = [], 0

    def interrupted(at):
        """Whether a block was interrupted before call or line number `at`."""
        seen = 0

        def trace(frame, event, arg):
            nonlocal seen
            if frame.f_code.co_filename != compiled_code.__file__:
                return None
            name = frame.f_code.co_name  # a lock's own two lines are left out: nothing can come between them
            if (event == "call" and name != "compiled") or (event == "line" and name == "_put"):
                seen += 1
                if seen == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with compiled_code.compiled(model.model, attention_of(model)):
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    while interrupted(lines + 1):
        lines += 1
        inside, replaced = compiled_code._inside.get(), dict(compiled_code._replaced)
        patched = [name for name, m in model.named_modules() if "forward" in m.__dict__]
        if inside or replaced or patched or modeling_llama.apply_rotary_pos_emb is not rotary:
            left.append((lines, inside, patched))
            break
    assert lines > 50 or left
    assert left == []


@pytest.mark.parametrize("bias", [False, True])
def test_halves_of_a_gated_mlp_are_one_product(bias):
    model = tiny_model(mlp_bias=bias)
    mlp = model.model.layers[1].mlp
    before, named = copy.deepcopy(mlp.state_dict()), dict(mlp.named_parameters())
    x = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        expected = mlp(x)
        stand_in = gated_as_one(mlp)
        assert stand_in is not mlp
        torch.testing.assert_close(type(mlp).forward(stand_in, x), expected)
    assert len({getattr(mlp, name).weight.untyped_storage().data_ptr() for name in GATED}) == 1
    assert all(p is named[n] and torch.equal(p, before[n]) for n, p in mlp.named_parameters())
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2)  # seen by a stand-in that was made before
        torch.testing.assert_close(type(mlp).forward(stand_in, x), mlp(x))
    products = []

    def counted(graph, inputs):
        before = sum(node.target is nn.functional.linear for node in graph.graph.nodes)
        once = computed_once(graph)
        products.append((before, sum(node.target is nn.functional.linear for node in once.graph.nodes)))
        return once

    made = torch.compile(type(mlp).forward, backend=counted)
    with torch.no_grad():
        torch.testing.assert_close(made(stand_in, x), mlp(x))
        torch.testing.assert_close(made(mlp, x), mlp(x))
    assert products == [(3, 2), (3, 3)]


def test_mlps_that_are_built_otherwise_stand_for_themselves():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda *args: None)
    assert gated_as_one(mlp) is mlp
    other = model.model.layers[1].mlp
    other.up_proj.weight = other.gate_proj.weight
    assert gated_as_one(other) is other
    plain = nn.Linear(3, 3)
    assert gated_as_one(plain) is plain


def test_biases_of_a_stand_in_are_the_models_own_so_that_a_graph_may_outlive_it():
    model = tiny_model(mlp_bias=True)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 3, model.config.hidden_size)
    named = dict(mlp.named_parameters())
    stand_in = gated_as_one(mlp)
    part = weakref.ref(stand_in.gate_proj.whole_bias)
    with torch.no_grad():
        mlp.gate_proj.bias.add_(1)
        torch.testing.assert_close(type(mlp).forward(stand_in, x), mlp(x))
    address = stand_in.gate_proj.whole_bias.data_ptr()
    del stand_in
    gc.collect()
    assert part() is None
    assert {b.untyped_storage().data_ptr() for b in (mlp.gate_proj.bias, mlp.up_proj.bias)} == {address}
    assert all(p is named[n] for n, p in mlp.named_parameters())


def test_a_weight_that_layers_share_stays_where_it_is():
    model = tiny_model()
    first, *others = [layer.mlp for layer in model.model.layers]
    for other in others:
        other.gate_proj.weight = first.gate_proj.weight
    x = torch.randn(1, 3, model.config.hidden_size)
    with torch.no_grad():
        expected = [mlp(x) for mlp in (first, *others)]
        assert gated_as_one(first) is not first
        addresses = [p.data_ptr() for p in model.parameters()]
        assert [gated_as_one(other) for other in others] == others
        gated_as_one(first)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        for mlp, wanted in zip((first, *others), expected, strict=True):
            torch.testing.assert_close(type(mlp).forward(gated_as_one(mlp), x), wanted)
    first.up_proj.weight = nn.Parameter(first.up_proj.weight + 1)  # the one before is gone, and nobody else lies there
    assert gated_as_one(first) is not first


class Gated(nn.Module):
    """A gated MLP of somebody else."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)


class InputChangesMLP(Gated):
    def forward(self, x):
        x = x + 0
        gate = self.gate_proj(x)
        x.mul_(2)
        return gate * self.up_proj(x)


class ProductChangesMLP(Gated):
    def forward(self, x):
        gate = self.gate_proj(x)
        once_more = self.gate_proj(x)
        gate += 1
        return gate * once_more


class ActivatedInPlaceMLP(Gated):
    def forward(self, x):
        return nn.functional.silu(self.gate_proj(x), inplace=True) * self.up_proj(x)


class AsksForDtypeMLP(Gated):
    def forward(self, x):
        return self.gate_proj(x.to(self.gate_proj.weight.dtype)) * self.up_proj(x)


@pytest.mark.parametrize("kind", [InputChangesMLP, ProductChangesMLP, ActivatedInPlaceMLP, AsksForDtypeMLP])
def test_mlps_that_change_tensors_in_place_or_ask_for_weights_compute_what_they_did(kind):
    torch.manual_seed(0)
    mlp, x = kind(), torch.randn(3, 8)
    made = torch.compile(kind.forward, backend=lambda graph, inputs: computed_once(graph))
    with torch.no_grad():
        stand_in = gated_as_one(mlp)
        assert stand_in is not mlp
        torch.testing.assert_close(made(stand_in, x), mlp(x))


def test_models_whose_mlps_were_laid_together_are_saved_whole(tmp_path):
    model = tiny_model(mlp_bias=True)
    before = copy.deepcopy(model.state_dict())
    assert all(gated_as_one(layer.mlp) is not layer.mlp for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in loaded.state_dict().items())
