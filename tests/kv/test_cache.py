"""The cache under a model: eviction is the dense mask exactly, whatever the chunks; and the transformers protocol."""

import copy

import pytest
import torch
from transformers import DynamicCache

from octavo import KVCache, attach, detach
from octavo.attachment import attachment_of
from octavo.errors import CacheBudgetError, CacheStateError, NotAttachedError
from tiny import FAMILIES, feed, tiny_adapter, tiny_model, tokens


def oracle(model, ids, mask=None):
    """Logits of one forward without a cache: hard decisions as a mask."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_hard_mask_equals_chunked_prefill_and_decode(chunk, shift, granularity):
    model = tiny_model()
    adapter = tiny_adapter(model, shift=shift, granularity=granularity)
    ids = tokens(2, 300)
    dense = oracle(model, ids)
    attach(model, adapter, chunk=chunk)
    expected = oracle(model, ids)
    assert (expected - dense).abs().max() > 0.1, "eviction must matter for this test to mean anything"
    got, cache = feed(model, ids, 250)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    marked = torch.stack(attachment_of(model).policy.marked)  # [L, B, H, T]
    newest = torch.arange(300) >= 300 - adapter.gates.spec.eviction.window
    stays = (~marked | newest).sum(-1).transpose(0, 1)
    assert torch.equal(cache.kept, stays), "what the cache holds is what the gates keep"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_evicts_exactly(family):
    model = tiny_model(family)
    attach(model, tiny_adapter(model), chunk=32)
    ids = tokens(1, 150)
    got, cache = feed(model, ids, 120)
    torch.testing.assert_close(got, oracle(model, ids), rtol=0, atol=1e-4)
    assert cache.kept.float().mean() < 110


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("chunk", [5, 512])
def test_left_padding_equals_each_sequence_alone(shift, chunk):
    model = tiny_model()
    attach(model, tiny_adapter(model, shift=shift), chunk=chunk)
    lengths, width = [90, 57, 31], 90
    ids = tokens(3, width)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = KVCache(model)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
        steps = []
        for i in range(12):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            step = tokens(3, 1, seed=50 + i)
            position = mask.sum(1, keepdim=True) - 1
            steps.append(
                model(input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache).logits
            )
    for b, n in enumerate(lengths):
        alone = torch.cat([ids[b : b + 1, width - n :], *[tokens(3, 1, seed=50 + i)[b : b + 1] for i in range(12)]], 1)
        expected = oracle(model, alone)[0]
        torch.testing.assert_close(got[b, width - n :], expected[:n], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat(steps, 1)[b], expected[n:], rtol=0, atol=1e-4)


def test_a_mask_of_the_new_tokens_alone_is_understood():
    model = tiny_model()
    attach(model, tiny_adapter(model), chunk=8)
    ids, cache = tokens(1, 60), KVCache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :30], past_key_values=cache)
        mask = torch.ones(1, 34, dtype=torch.long)
        mask[:, :4] = 0
        padded = torch.cat([tokens(1, 4, seed=9), ids[:, 30:]], 1)
        got = model(input_ids=padded, attention_mask=mask, past_key_values=cache,
                    position_ids=torch.arange(26, 60)[None]).logits[:, 4:]  # fmt: skip
    torch.testing.assert_close(got, oracle(model, ids)[:, 30:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("prompt", [19, 20, 21, 22, 41])
def test_prompts_about_as_long_as_the_window(prompt, shift):
    """The first token that can expire does so right after a prompt of window + 1 tokens."""
    model = tiny_model()
    attach(model, tiny_adapter(model, window=20, shift=shift, rate=0.9))
    ids = tokens(2, 60)
    got, cache = feed(model, ids, prompt)
    torch.testing.assert_close(got, oracle(model, ids), rtol=0, atol=1e-4)
    wasted = cache.tables.length[list(cache.rows)] - cache.kept
    assert wasted.min() >= 0
    assert wasted.max() <= 1, "the token that expired last has a slot until the next one takes it"


def test_multi_turn_continuation_in_uneven_pieces():
    model = tiny_model()
    attach(model, tiny_adapter(model), chunk=16)
    ids, cache, parts, at = tokens(2, 200), KVCache(model), [], 0
    with torch.no_grad():
        for n in (3, 50, 1, 1, 17, 16, 40, 1, 71):
            parts.append(model(input_ids=ids[:, at : at + n], past_key_values=cache).logits)
            at += n
    torch.testing.assert_close(torch.cat(parts, 1), oracle(model, ids), rtol=0, atol=1e-4)
    assert cache.seen == cache.get_seq_length() == 200


def test_memory_really_shrinks():
    model = tiny_model()
    ids = tokens(1, 600)
    attach(model)
    _, dense = feed(model, ids, 600)
    attach(model, tiny_adapter(model, window=8, rate=0.95))
    _, sparse = feed(model, ids, 600)
    assert dense.dense_nbytes == sparse.dense_nbytes
    assert dense.nbytes >= dense.dense_nbytes
    share = sparse.kept.float().mean().item() / 600
    assert sparse.nbytes < dense.nbytes * (share + 0.1)
    tables, memory = sparse.tables, sparse.memory
    pages = tables.held()
    assert len(pages) == len(pages.unique()) == memory.pool.held()
    assert sparse.nbytes == len(pages) * (memory.layout.nbytes + 8) + tables.row_nbytes
    row = [tables.table, tables.length, tables.lost, tables.newest, tables.position, tables.marks]
    assert tables.row_nbytes == sum(t[:1].numel() * t.element_size() for t in row)
    assert memory.nbytes >= sparse.nbytes


def test_dense_nbytes_is_what_a_dynamic_cache_holds():
    model, ids = tiny_model(), tokens(2, 50)
    with torch.no_grad():
        cache = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    attach(model)
    assert feed(model, ids, 50)[1].dense_nbytes == held


def test_reset_gives_memory_back_and_starts_anew():
    model = tiny_model()
    attach(model, tiny_adapter(model))
    first, cache = feed(model, tokens(1, 80), 80)
    cache.reset()
    assert cache.nbytes == 0
    assert cache.seen == 0
    again, _ = feed(model, tokens(1, 80), 80, cache)
    torch.testing.assert_close(again, first)


def test_budget_too_small_is_refused_and_the_cache_still_works():
    model = tiny_model()
    attach(model)
    ids = tokens(1, 100)
    _, full = feed(model, ids[:, :60], 60)
    cache = KVCache(model, budget=full.nbytes)
    got, _ = feed(model, ids[:, :40], 40, cache)
    with pytest.raises(CacheBudgetError, match="raise the budget"), torch.no_grad():
        model(input_ids=ids[:, 40:], past_key_values=cache)
    assert cache.seen == 40
    with torch.no_grad():
        more = model(input_ids=ids[:, 40:50], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([got, more], 1), oracle(model, ids[:, :50]), rtol=0, atol=1e-4)


def test_crop_undoes_where_nothing_was_evicted():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=64))
    ids = tokens(2, 60)
    _, cache = feed(model, tokens(2, 60, seed=9), 40)
    cache.crop(-60)
    assert cache.seen == 0
    _, cache = feed(model, ids, 50, cache)
    cache.crop(-25)
    assert cache.seen == 35
    with torch.no_grad():
        got = model(input_ids=ids[:, 35:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 35:], rtol=0, atol=1e-4)


def test_crop_with_shift_reopens_the_newest_decision():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=30, shift=1))
    ids, other = tokens(1, 100), tokens(1, 100, seed=4)
    cache = KVCache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :25], past_key_values=cache)
        model(input_ids=other[:, :5], past_key_values=cache)
        cache.crop(-5)
        got = model(input_ids=ids[:, 25:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 25:], rtol=0, atol=1e-4)


def test_crop_that_needs_evicted_tokens_is_refused():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=8, rate=0.9))
    ids = tokens(1, 90)
    _, cache = feed(model, ids[:, :80], 80)
    with pytest.raises(CacheStateError, match="already evicted"):
        cache.crop(-40)
    with torch.no_grad():
        got = model(input_ids=ids[:, 80:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 80:], rtol=0, atol=1e-4)


def test_crop_keeps_everything_without_eviction():
    model = tiny_model()
    attach(model)
    ids = tokens(2, 70)
    _, cache = feed(model, ids, 60)
    cache.crop(30)  # the older meaning: keep 30
    assert cache.seen == 30
    assert cache.is_croppable
    with torch.no_grad():
        got = model(input_ids=ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 30:], rtol=0, atol=1e-4)
    with pytest.raises(CacheStateError, match="cannot remove"):
        cache.crop(-1000)


@pytest.mark.parametrize("shift", [0, 1])
def test_sequences_can_be_selected_and_repeated(shift):
    model = tiny_model()
    attach(model, tiny_adapter(model, shift=shift), chunk=32)
    ids = tokens(3, 120)
    _, cache = feed(model, ids[:, :100], 100)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    picked = ids[[2, 0, 2]]
    with torch.no_grad():
        got = model(input_ids=picked[:, 100:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, picked)[:, 100:], rtol=0, atol=1e-4)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6


def test_a_deep_copy_is_independent():
    model = tiny_model()
    attach(model, tiny_adapter(model))
    ids = tokens(1, 100)
    _, cache = feed(model, ids[:, :80], 80)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        model(input_ids=tokens(1, 20, seed=8), past_key_values=cache)
        got = model(input_ids=ids[:, 80:], past_key_values=twin).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 80:], rtol=0, atol=1e-4)


def test_a_failed_forward_leaves_the_cache_as_it_was():
    model = tiny_model()
    attach(model, tiny_adapter(model))
    ids = tokens(1, 60)
    _, cache = feed(model, ids[:, :40], 40)
    layer = model.model.layers[1].mlp

    def fail(*args):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(input_ids=ids[:, 40:], past_key_values=cache)
    hook.remove()
    with torch.no_grad():
        got = model(input_ids=ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(got, oracle(model, ids)[:, 40:], rtol=0, atol=1e-4)


def test_a_cache_is_refused_where_it_does_not_belong():
    model = tiny_model()
    with pytest.raises(NotAttachedError, match="attach"):
        KVCache(model)
    attach(model)
    cache = KVCache(model)
    feed(model, tokens(1, 5), 5, cache)
    with pytest.raises(CacheStateError, match="sequences"), torch.no_grad():
        model(input_ids=tokens(2, 5), past_key_values=cache)
    attach(model)  # anew
    with pytest.raises(CacheStateError, match="another model"), torch.no_grad():
        model(input_ids=tokens(1, 5), past_key_values=cache)
    detach(model)
    with pytest.raises(NotAttachedError), torch.no_grad():
        model(input_ids=tokens(1, 5), past_key_values=cache)


def test_decoding_reuses_the_slots_of_expired_tokens():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=8, rate=0.9))
    _, cache = feed(model, tokens(1, 200), 200)
    before = cache.memory.pool.held()
    with torch.no_grad():
        for i in range(40):
            model(input_ids=tokens(1, 1, seed=i), past_key_values=cache)
    # 40 tokens a row, of which about 4 are kept: a page more for each of the 6 rows, two at the worst
    assert before <= cache.memory.pool.held() <= before + 12


def test_caches_of_one_model_share_one_memory_that_is_empty_when_they_are_gone():
    model = tiny_model()
    attach(model, tiny_adapter(model))
    _, one = feed(model, tokens(2, 60), 60)
    _, two = feed(model, tokens(1, 90), 90)
    memory = one.memory
    assert two.memory is memory
    assert memory.sequences == 3
    pages = memory.pool.held()
    assert one.nbytes + two.nbytes == pages * memory.pool.page_nbytes + 3 * one.tables.row_nbytes
    del one
    memory.reclaim()
    assert memory.pool.held() * memory.pool.page_nbytes == two.nbytes - two.tables.row_nbytes
    two.reset()
    assert (memory.sequences, memory.pool.held()) == (0, 0)
    assert not memory.pool.raw[2 : memory.pool.size].any(), "pages that nobody holds are zero"
