"""Where tokens stand: padding takes no positions, and masks and `position_ids` that do not fit are refused."""

import copy

import pytest
import torch

from octavo import KVCache, attach
from octavo.errors import CacheStateError, PromptError
from octavo.kv.late import Late
from tiny import FAMILIES, tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3 if got.is_cuda else 1e-4)


def alone(model, ids, columns=1):
    """Logits of the last columns of a text without a cache."""
    return model(ids, use_cache=False).logits[:, -columns:]


def padded(ids, at, count):
    """The same text with padding before token `at`, and its mask."""
    filled = torch.cat([ids[:, :at], ids.new_zeros(len(ids), count), ids[:, at:]], 1)
    mask = torch.ones_like(filled)
    mask[:, at : at + count] = 0
    return filled, mask


@DEVICES
@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("at", [0, 12])
def test_a_snapshot_of_a_padded_text_goes_on_as_the_text_does(at, evict, device):
    model, ids = tiny_model().to(device), tokens(1, 30).to(device)
    attach(model, tiny_adapter(model) if evict else None, chunk=16)
    filled, mask = padded(ids, at, 10)
    cache = KVCache(model)
    with torch.no_grad():
        model(filled[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        restored = KVCache.restore(model, cache.snapshot())
        expected = alone(model, ids)
        close(model(ids[:, -1:], past_key_values=restored).logits, expected)
        close(model(ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits, expected)
        close(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits, expected)


@DEVICES
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_sequences_of_other_lengths_go_on_together_without_position_ids(columns, device):
    model = tiny_model().to(device)
    attach(model, chunk=16)
    texts = [tokens(1, n + columns, seed=n).to(device) for n in (20, 11, 35)]
    batch, *others = (KVCache(model) for _ in texts)
    with torch.no_grad():
        for text, cache in zip(texts, (batch, *others), strict=True):
            model(text[:, :-columns], past_key_values=cache)
        for other in others:
            batch.join(other)
        got = model(torch.cat([text[:, -columns:] for text in texts]), past_key_values=batch).logits
        close(got, torch.cat([alone(model, text, columns) for text in texts]))
        batch.leave([0, 2])
        more = tokens(1, 4, seed=9).to(device)
        close(model(more, past_key_values=batch).logits, alone(model, torch.cat([texts[1], more], 1), 4))


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("at", [0, 12])
def test_forwards_with_and_without_a_cache_count_alike(at, swift):
    model, ids = model_of(), tokens(2, 40)
    attach(model, pair(model, 2, True) if swift else tiny_adapter(model), chunk=16)
    filled, mask = padded(ids, at, 7)
    with torch.no_grad():
        text = model(ids, use_cache=False).logits
        for use_cache in (False, True):
            got = model(filled, attention_mask=mask, use_cache=use_cache).logits
            close(got[mask.bool()].view_as(text), text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [16, 512])
def test_padded_generation_is_token_for_token_that_of_the_unattached_model(family, chunk):
    model, ids = tiny_model(family), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, :39] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assert torch.equal(attach(model, chunk=chunk).generate(ids, **options), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_without_position_ids_moves_on():
    model, ids = attach(tiny_model().cuda()), tokens(2, 60).cuda()
    cache = KVCache(model)
    token, out = ids[:, 30:31].clone(), torch.zeros(2, 1, 97, device="cuda")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :30], past_key_values=cache)
        cache.reserve(40)

        def step():
            out.copy_(model(token, past_key_values=cache).logits)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for i in range(30, 33):
                token.copy_(ids[:, i : i + 1])
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for i in range(33, 60):
            token.copy_(ids[:, i : i + 1])
            graph.replay()
            close(out[:, 0], expected[:, i])


# Positions that are not the tokens' own


@DEVICES
def test_what_was_read_elsewhere_is_neither_kept_nor_joined(device):
    model, ids = attach(tiny_model().to(device)), tokens(1, 40).to(device)
    cache, other = KVCache(model), KVCache(model)
    with torch.no_grad():
        model(ids[:, :30], position_ids=torch.arange(7, 37, device=device)[None], past_key_values=cache)
        model(ids[:, :30], past_key_values=other)
        with pytest.raises(CacheStateError, match="snapshot cannot hold this cache: its tokens were read at other"):
            cache.snapshot()
        if device == "cpu":
            with pytest.raises(CacheStateError, match="cannot run as one batch"):
                other.join(cache)
        else:  # the host does not wait for the answer
            other.join(cache)
            torch.cuda.synchronize()
            with pytest.raises(CacheStateError, match="cannot run as one batch"):
                model(tokens(2, 1).to(device), past_key_values=other)
            return
        got = model(ids[:, 30:], position_ids=torch.arange(37, 47)[None], past_key_values=cache).logits
        close(got, alone(model, ids, 10))
        cache.reset()
        model(ids[:, :30], past_key_values=cache)
        other.join(cache)
        assert other.snapshot(sequence=1).boundaries == (30,)


@pytest.mark.parametrize("step", ["prompt", "decode"])
@pytest.mark.parametrize("shape", ["row", "batch", "axes"])
def test_positions_of_every_shape_are_compared_with_the_tokens(shape, step):
    model, ids = attach(tiny_model()), tokens(2, 12)
    columns = torch.arange(12)
    given = {"row": columns[None], "batch": columns.expand(2, -1), "axes": columns.expand(2, -1)}[shape]
    for wrong in (False, True):
        cache = KVCache(model)
        with torch.no_grad():
            model(ids[:, :11], position_ids=given[:, :11] + (wrong and step == "prompt"), past_key_values=cache)
            model(ids[:, 11:], position_ids=given[:, 11:] + (wrong and step == "decode"), past_key_values=cache)
        assert bool(cache.moved) == wrong
        assert bool(copy.deepcopy(cache).moved) == wrong
        cache.crop(-12)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.moved is None, "what was read elsewhere is gone"


def test_padding_may_stand_anywhere_and_a_failed_prompt_leaves_no_trace(monkeypatch):
    model, ids = attach(tiny_model(), chunk=8), tokens(1, 30)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert cache.snapshot().boundaries == (20,)
        commit, calls = KVCache.commit, []

        def breaking(self, *args):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            commit(self, *args)

        monkeypatch.setattr(KVCache, "commit", breaking)
        with pytest.raises(MemoryError):
            model(ids, position_ids=torch.arange(100, 130)[None], past_key_values=cache)
    assert cache.seen == 30
    assert cache.snapshot().boundaries == (20,)


def test_a_join_that_turns_out_to_be_wrong_is_refused_by_every_later_forward(monkeypatch):
    """As on a GPU, where the answer comes after the join."""
    model, ids = attach(tiny_model()), tokens(1, 12)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache._joined.post(torch.tensor(True), None)
        for _ in range(2):
            with pytest.raises(CacheStateError, match="were joined that cannot run as one batch"):
                model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
    assert isinstance(cache._joined, Late)


# Shapes and lengths


MASKS = {"short": (1, 10), "long": (1, 50), "another batch": (2, 30), "flat": (30,)}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_a_mask_of_another_shape_is_refused(shape, use_cache):
    model = attach(tiny_model())
    with torch.no_grad(), pytest.raises(PromptError, match=r"attention mask has shape .* expected \[1, 30\]"):
        model(tokens(1, 30), attention_mask=torch.ones(shape), use_cache=use_cache)


@pytest.mark.parametrize("columns", [1, 12])
@pytest.mark.parametrize("given", ["one too few", "one too many", "another batch", "another batch of new ones"])
def test_a_mask_covers_all_columns_of_a_cache_and_the_new_ones_or_these_alone(given, columns):
    model, ids = attach(tiny_model()), tokens(2, 30 + columns)
    full = 30 + columns
    shape = {
        "one too few": (2, full - 1), "one too many": (2, full + 1), "another batch": (1, full),
        "another batch of new ones": (1, columns),
    }[given]  # fmt: skip
    cache = KVCache(model)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        with pytest.raises(CacheStateError, match=rf"expected \[2, {full}\], one row per sequence: 30 columns"):
            model(ids[:, 30:], attention_mask=torch.ones(shape), past_key_values=cache)
        assert cache.seen == 30
        for mask in (torch.ones(2, full), torch.ones(2, columns)):
            got = model(ids[:, 30:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
            close(got, alone(model, ids, columns))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("shape", [(1, 29), (2, 30), (30, 1), (1, 1, 1, 30)])
def test_positions_of_another_shape_are_refused(shape, use_cache):
    model = attach(tiny_model())
    with torch.no_grad(), pytest.raises(PromptError, match=r"position_ids have shape .* expected \[1, 30\]"):
        model(tokens(1, 30), position_ids=torch.zeros(shape, dtype=torch.long), use_cache=use_cache)


def test_padding_takes_none_of_the_positions_that_the_model_has():
    model, ids = tiny_model(), tokens(1, 30)
    filled, mask = padded(ids, 0, 1000)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4}
    expected = model.generate(filled, **options)
    attach(model)
    assert torch.equal(model.generate(filled, **options), expected)
    cache = KVCache(model)
    with torch.no_grad():
        model(filled, attention_mask=mask, past_key_values=cache)
        model(tokens(1, 990), past_key_values=cache)
        with pytest.raises(PromptError, match="the prompt has 1,025 tokens, the model has 1,024 positions"):
            model(tokens(1, 5), past_key_values=cache)
    filled, mask = padded(tokens(1, 1025), 0, 9)
    with torch.no_grad(), pytest.raises(PromptError, match="the prompt has 1,025 tokens"):
        model(filled, attention_mask=mask)


def test_a_short_sequence_goes_on_after_a_long_one_has_left_its_batch():
    model, ids = attach(tiny_model()), tokens(1, 41)
    long, short = KVCache(model), KVCache(model)
    with torch.no_grad():
        model(tokens(1, 1000), past_key_values=long)
        model(ids[:, :11], past_key_values=short)
        short.join(long)
        short.leave([1])
        close(model(ids[:, 11:], past_key_values=short).logits, alone(model, ids, 30))
