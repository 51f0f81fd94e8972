"""Sums that wait for a norm: layers compute the same, and whoever else reads one finds it computed."""

import copy

import pytest
import torch
from transformers import GemmaConfig, GraniteConfig, Olmo2Config, Phi3Config, Qwen3MoeConfig, SmolLM3Config

from octavo.attachment import compiled as compiled_code
from octavo.attachment.sums import Sum, computed, normed, waiting
from tiny import FAMILIES, SHAPE, attention_of, tiny_model, tokens

OTHERS = {  # that scale what they add, norm it before, choose among experts, or name their projections otherwise
    "granite": lambda: GraniteConfig(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=16),
    "phi3": lambda: Phi3Config(**SHAPE),
    "smollm3": lambda: SmolLM3Config(**SHAPE),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2
    ),
}
PLAIN = {*FAMILIES, "gemma", "phi3", "smollm3"}  # whose layers add what attention and MLP return, and norm it


@pytest.fixture
def fused(monkeypatch):
    """Pieces as the model has them instead of compiled; the list gets each sum that is computed with its norm."""
    seen, with_sum = [], compiled_code.with_sum

    def counted(norm):
        both = with_sum(norm)

        def run(module, a, b):
            seen.append(module)
            return both(module, a, b)

        return run

    monkeypatch.setattr(compiled_code, "_compiled", lambda function, dynamic: function)
    monkeypatch.setattr(compiled_code, "with_sum", counted)
    return seen


def run(model, ids):
    """The last hidden states of a decoder whose pieces are compiled."""
    with torch.no_grad(), compiled_code.compiled(model.base_model, attention_of(model), sums=True):
        return computed(model.base_model(ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("family", sorted({**FAMILIES, **OTHERS}))
def test_a_decoder_computes_the_same(family, fused):
    model, ids = tiny_model({**FAMILIES, **OTHERS}[family]), tokens(2, 12)
    with torch.no_grad():
        expected = model.base_model(ids, use_cache=False).last_hidden_state
    got = run(model, ids)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    if family in PLAIN:  # every norm of the residual stream but the first, which reads embeddings
        assert len(fused) == 2 * len(model.model.layers)


def test_hooks_find_sums_computed_and_may_change_them(fused):
    model, ids, seen = tiny_model(), tokens(2, 12), {}
    first, second = model.model.layers[:2]

    def reads(module, args, out):
        seen.setdefault("out", []).append(float(out[:, -1].sum()))
        seen.setdefault("shape", []).append((out.shape, out.dtype, out.is_contiguous()))

    hooks = [
        first.register_forward_hook(reads),
        second.register_forward_hook(lambda module, args, out: out.mul_(2)),
    ]
    with torch.no_grad():
        expected = model.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(run(model, ids), expected, rtol=0, atol=1e-6)
    assert seen["out"][0] == pytest.approx(seen["out"][1], abs=1e-5)
    assert seen["shape"][0] == seen["shape"][1]
    for hook in hooks:
        hook.remove()
    assert len(fused) < 2 * len(model.model.layers), "what a hook has read is added already"


def test_what_is_watched_or_replaced_is_left_alone(fused):
    model, ids, seen = tiny_model(), tokens(1, 9), []
    first, second = model.model.layers[:2]
    hook = first.self_attn.o_proj.register_forward_hook(lambda *args: seen.append(type(args[-1])))
    own = second.self_attn.o_proj.forward
    second.self_attn.o_proj.forward = lambda x: own(x) * 2
    with torch.no_grad():
        expected = model.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(run(model, ids), expected, rtol=0, atol=1e-6)
    assert seen == [torch.Tensor] * 2
    assert len(fused) == 2 * len(model.model.layers) - 1, "that of embeddings and what is watched"
    hook.remove()
    assert [m for m in model.modules() if "forward" in m.__dict__] == [second.self_attn.o_proj]


def test_a_norm_may_be_called_by_name(fused):
    model, (a, b) = tiny_model(), torch.randn(2, 1, 4, 96)
    norm = model.model.norm
    with torch.no_grad():
        expected = norm(a + b)
        with compiled_code.compiled(model.base_model, attention_of(model), sums=True):
            assert torch.equal(norm(hidden_states=a + b), expected)
            assert torch.equal(norm(hidden_states=a + Sum(b)), expected)
            assert torch.equal(norm(a + Sum(b)), expected)
    assert len(fused) == 1


def test_a_block_s_mode_ends_with_it(fused):
    model, ids = tiny_model(), tokens(1, 9)
    attention = attention_of(model)

    def fuses():
        before = len(fused)
        model.base_model(ids, use_cache=False)
        return len(fused) > before

    with torch.no_grad():
        with compiled_code.compiled(model.base_model, attention, sums=True):
            assert fuses()
            with compiled_code.compiled(model.base_model, attention):
                assert not fuses()
            assert fuses()
        with compiled_code.compiled(model.base_model, attention):
            assert not fuses()


def test_terms_that_change_in_place_are_noticed(fused):
    model, ids, held = tiny_model(), tokens(1, 9), {}
    layer = model.model.layers[1]
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: held.update(out=out[0])),
        layer.register_forward_hook(lambda module, args, out: held["out"].zero_().sum() * 0 + out),
    ]
    with torch.no_grad():
        expected = model.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(run(model, ids), expected, rtol=0, atol=1e-6)  # what was read before it changed
    for hook in hooks:
        hook.remove()
    a, b = torch.randn(2, 3, 5)
    addend = Sum(b)
    for change in (a.zero_, lambda: b.mul_(2), lambda: addend.add_(1)):
        both = a + addend
        change()
        with pytest.raises(RuntimeError, match="changed in place"):
            both.sum()
    once = computed(a + Sum(b))
    a.add_(1)
    assert torch.equal(once, a - 1 + b) or (once - (a - 1 + b)).abs().max() < 1e-6  # it was added before


def test_what_is_no_plain_sum_does_not_wait():
    a, b = torch.randn(2, 3, 3)
    assert waiting((a, b)) == (a, b)
    assert type(waiting(a.t())) is torch.Tensor
    for other in (a + Sum(b.t()), a.t() + Sum(b)):
        assert type(other) is torch.Tensor
    total = a + Sum(b)
    plain = normed(lambda x, more: x * more, lambda a, b: pytest.fail("with another argument"), total, 2)
    torch.testing.assert_close(plain, 2 * (a + b))
    total = a + Sum(b)
    assert torch.equal(normed(None, lambda a, b: (a + b, a), total), a)
    assert len(total._terms) == 1, "the sum is kept for those who read it next"
    assert type(copy.deepcopy(a + Sum(b))) is torch.Tensor


def test_a_sum_of_two_waits_and_others_are_added_at_once():
    a, b, c = torch.randn(3, 2, 5)
    for both in (a + Sum(b), Sum(b) + a):
        assert isinstance(both, Sum)
        assert len(both._terms) == 2
        torch.testing.assert_close(computed(both), a + b)
        assert len(both._terms) == 1
        torch.testing.assert_close(computed(both + Sum(c)), a + b + c)
    more = (a + Sum(b)) + Sum(c)  # the first of them is computed for the second
    torch.testing.assert_close(computed(more), a + b + c)
    for other, expected in (
        (torch.add(a, Sum(b), alpha=2), a + 2 * b), (Sum(b) + 1.5, b + 1.5), (Sum(b) + a[0], b + a[0]),
        (Sum(b) + a.double(), b + a.double()), (torch.cat([Sum(b), a + Sum(c)]), torch.cat([b, a + c])),
        (a - Sum(b), a - b), ((a + Sum(b)).sum(), (a + b).sum()),
    ):  # fmt: skip
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, expected)
    assert computed(a) is a
    both = a + Sum(b)
    assert both.data_ptr() == computed(both).data_ptr() != 0  # what a kernel is given
