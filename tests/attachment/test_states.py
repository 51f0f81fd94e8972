"""Models some of whose layers have a state of their own: it goes with the sequences, and what cannot be undone is
refused."""

import copy

import pytest
import torch

from octavo import KVCache, ReuseStore, attach
from octavo.attachment import Snapshot, attachment_of
from octavo.attachment.states import States
from octavo.errors import CacheStateError, UnsupportedModelError
from tiny import feed, tiny_adapter, tokens
from tiny_decoders import tiny_decoder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
HYBRIDS = ["qwen3_next", "falcon_h1", "lfm2", "jamba"]  # beside attention: linear, Mamba in the same layer, convolution


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    """(model with random gates, ids, logits under the hard mask)."""
    model, ids = tiny_decoder(request.param), tokens(3, 40)
    attach(model, tiny_adapter(model, window=6), chunk=16)
    with torch.no_grad():
        return model, ids, model(ids, use_cache=False).logits


def test_copies_choices_and_turns_go_on_from_their_own_states(hybrid):
    model, ids, expected = hybrid
    _, cache = feed(model, ids[:, :24], 20)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        turn = model(ids[:, 24:31], past_key_values=cache).logits  # several tokens at once
        torch.testing.assert_close(turn, expected[:, 24:31], **CLOSE)
        twin.batch_select_indices(torch.tensor([2, 0, 2]))
        chosen = ids[[2, 0, 2]]
        for i in range(24, 28):
            step = model(chosen[:, i : i + 1], past_key_values=twin).logits
            torch.testing.assert_close(step, expected[[2, 0, 2], i : i + 1], **CLOSE)
        after = model(ids[:, 31:32], past_key_values=cache).logits
    torch.testing.assert_close(after, expected[:, 31:32], **CLOSE)
    assert cache.kept.amin() < 20
    assert cache.nbytes > cache.states.nbytes > 0


def test_a_model_that_counts_each_input_from_its_beginning_is_told_where_a_text_goes_on():
    model, ids = tiny_decoder("bamba"), tokens(1, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    attach(model, chunk=16)
    got, _ = feed(model, ids, 37)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_sequences_join_and_leave_with_their_states(hybrid):
    model, ids, expected = hybrid
    _, one = feed(model, ids[:1, :20], 20)
    _, two = feed(model, ids[1:, :26], 20)
    one.join(two)
    assert (two.seen, two.states.nbytes) == (0, 0)
    new = torch.stack([ids[0, 20], ids[1, 26], ids[2, 26]])[:, None]
    with torch.no_grad():
        got = model(new, past_key_values=one).logits[:, 0]
        torch.testing.assert_close(got, torch.stack([expected[0, 20], expected[1, 26], expected[2, 26]]), **CLOSE)
        one.leave([1])
        new = torch.stack([ids[0, 21], ids[2, 27]])[:, None]
        got = model(new, past_key_values=one).logits[:, 0]
    torch.testing.assert_close(got, torch.stack([expected[0, 21], expected[2, 27]]), **CLOSE)


def everything(cache):
    return {(row, name): t for row in range(3) for name, t in cache.states.tensors(row).items()}


@pytest.mark.parametrize("columns", [1, 5])
def test_a_forward_that_fails_leaves_states_as_they_were(hybrid, columns):
    model, ids, expected = hybrid
    _, cache = feed(model, ids[:, :22], 20)
    before = {name: t.clone() for name, t in everything(cache).items()}

    def fail(*_):
        raise MemoryError

    hook = attachment_of(model).layout.attention[-1].register_forward_hook(fail)
    with torch.no_grad():
        with pytest.raises(MemoryError):
            model(ids[:, 22 : 22 + columns], past_key_values=cache)
        hook.remove()
        assert before.keys() == everything(cache).keys()
        assert all(torch.equal(t, before[name]) for name, t in everything(cache).items())
        got = model(ids[:, 22:24], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 22:24], **CLOSE)


def test_a_snapshot_carries_pages_and_states(hybrid):
    model, ids, expected = hybrid
    _, cache = feed(model, ids[:, :22], 20)
    taken = Snapshot.from_bytes(cache.snapshot(sequence=1, tokens=ids[1, :22]).to_bytes())
    twin = KVCache.restore(model, taken)
    with torch.no_grad():
        got = model(ids[1:2, 22:30], past_key_values=twin).logits
    torch.testing.assert_close(got, expected[1:2, 22:30], **CLOSE)
    assert torch.equal(KVCache.restore(model, taken).kept[0], cache.kept[1])


def test_what_states_do_not_go_with_is_refused(hybrid):
    model, ids, expected = hybrid
    _, cache = feed(model, ids[:, :20], 20)
    assert not cache.is_croppable
    with pytest.raises(CacheStateError, match="layers with a state that has gone on"):
        cache.crop(-1)
    with pytest.raises(CacheStateError, match="for the last token read alone"):
        cache.snapshot([10])
    with pytest.raises(CacheStateError, match="layers with a state, which cannot take drafts back"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    with pytest.raises(CacheStateError, match="boundaries within a text cannot be kept"):
        cache.keep([30])
    cache.crop(-20)
    with torch.no_grad():
        got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, **CLOSE)
    cache.reset()
    assert cache.states.nbytes == 0
    with pytest.raises(UnsupportedModelError, match="a ReuseStore cannot keep"):
        attach(model, reuse=ReuseStore())


def test_beam_search_is_that_of_the_unattached_model():
    model, ids = tiny_decoder("qwen3_next"), tokens(2, 30)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(attach(model, chunk=16).generate(ids, **options), expected)


def test_models_without_states_have_none():
    model = attach(tiny_decoder("llama"))
    assert KVCache(model).states is None
    assert States(model.config).layers == {}
