"""What each token hands to the one after it, and keys and values that are made from it too."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import KVCache, ReuseStore, attach, save_published
from octavo.adapter_file import read_adapter, write_adapter
from octavo.attachment.supported import fingerprint
from octavo.errors import AdapterFileError, AdapterMismatchError, CacheStateError, ConfigError, UnsupportedModelError
from octavo.kv import chunk_step
from octavo.retrofit.regression import _Fit
from octavo.reuse import SimilarSettings
from octavo.swiftkv import SwiftKVAdapter, initial, load_swiftkv_adapter, save_swiftkv_adapter
from octavo.swiftkv.adapter import as_stored
from octavo.swiftkv.transform import shifted
from tiny import tokens
from tiny_swift import full, gates_for, model_of, pair, swiftkv_for

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.integers(1, 3), st.integers(0, 9), st.data())
def test_tokens_get_what_the_one_before_had(batch, length, data):
    x = torch.randn(batch, length, 2)
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=batch * length, max_size=batch * length))
    document = torch.tensor(lengths).view(batch, length).cumsum(1) // 3
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    valid = valid.view(batch, length).bool()
    for row in range(batch):
        for i in range(length):
            plain, packed, padded = shifted(x)[row, i], shifted(x, document)[row, i], shifted(x, None, valid)[row, i]
            same = i > 0 and document[row, i] == document[row, i - 1]
            assert torch.equal(plain, x[row, i - 1] if i else torch.zeros(2))
            assert torch.equal(packed, x[row, i - 1] if same else torch.zeros(2))
            tokens = [j for j in range(i) if valid[row, j]]
            assert torch.equal(padded, x[row, tokens[-1]] if tokens else torch.zeros(2))


def test_the_fit_with_the_token_before_is_least_squares_of_that_rank():
    """Against brute force: alternating least squares over the two factors from many starts."""
    generator = torch.Generator().manual_seed(0)
    n, first, others, out, rank = 400, 5, 4, 6, 2
    x = torch.randn(n, first + others, generator=generator)
    x[:, :first] += x[:, first:] @ torch.randn(others, first, generator=generator)  # what comes before is not apart
    y = x @ torch.randn(first + others, out, generator=generator) + torch.randn(n, out, generator=generator)
    y[:, 3:] *= 50  # the second of two blocks
    fit = _Fit(1e-12, constant=False)
    fit.add(x, y)
    hand, made, weight, bias = fit.solve_handed(lambda total: total, first, rank, 2)
    assert bias is None
    assert (hand.shape, made.shape, weight.shape) == ((rank, first), (out, rank), (out, others))
    scale = y.double().square().view(n, 2, 3).mean((0, 2)).sqrt().repeat_interleave(3)

    def error(hand, made, weight):
        return (
            ((y - x[:, :first].double() @ (made @ hand).T - x[:, first:].double() @ weight.T) / scale).square().mean()
        )

    best = min(alternated(x.double(), y.double() / scale, first, rank, seed) for seed in range(5))
    assert float(error(hand, made, weight)) == pytest.approx(best, rel=1e-6)
    torch.testing.assert_close(hand.square().mean(1), made.square().mean(0))


def alternated(x, y, first, rank, seed):
    hand = torch.randn(rank, first, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for _ in range(300):
        given = torch.cat([x[:, :first] @ hand.T, x[:, first:]], 1)
        solved = torch.linalg.lstsq(given, y).solution  # [rank + others, out]
        made = solved[:rank].T
        left = y - x[:, first:] @ solved[rank:]
        others = x[:, first:]
        # Of the best hand for this `made` and any weights of the others: least squares over vec(hand).
        off = x[:, :first] - others @ torch.linalg.lstsq(others, x[:, :first]).solution
        left = y - others @ torch.linalg.lstsq(others, y).solution
        hand = torch.linalg.lstsq(off, left @ torch.linalg.pinv(made).T).solution.T
    given = torch.cat([x[:, :first] @ hand.T, x[:, first:]], 1)
    return float((y - given @ torch.linalg.lstsq(given, y).solution).square().mean())


@pytest.mark.parametrize("storage", ["int8", "bf16", "fp32"])
def test_what_is_saved_is_loaded_and_other_adapters_files_do_not_change(storage, tmp_path):
    model = model_of()
    adapter = swiftkv_for(model, before=5)
    save_swiftkv_adapter(adapter, tmp_path / "a", storage)
    loaded = load_swiftkv_adapter(tmp_path / "a")
    assert loaded.transform.spec == adapter.transform.spec
    far = {"int8": 1 / 127, "bf16": 2**-8, "fp32": 0.0}[storage]
    for name, parameter in adapter.transform.named_parameters():
        given = dict(loaded.transform.named_parameters())[name]
        assert (given - parameter).abs().max() <= far * parameter.abs().max(), name
    save_swiftkv_adapter(swiftkv_for(model), tmp_path / "b", storage)
    assert "before" not in json.loads((tmp_path / "b" / "adapter.json").read_text())["spec"]
    assert load_swiftkv_adapter(tmp_path / "b").transform.spec.before == 0


def test_as_stored_is_what_a_file_gives_back(tmp_path):
    adapter = swiftkv_for(model_of(), before=5)
    save_swiftkv_adapter(adapter, tmp_path)
    theirs = load_swiftkv_adapter(tmp_path).transform.state_dict()
    for name, tensor in as_stored(adapter.transform).state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def changed(folder, change):
    """The adapter of a folder with other tensors or another spec, whole otherwise."""
    settings, tensors = read_adapter(folder, "swiftkv", (1,))
    change(settings["spec"], tensors)
    write_adapter(folder, {k: v for k, v in settings.items() if k != "sha256"}, tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec, tensors: spec.pop("before"),
        lambda spec, tensors: spec.update(before=0),
        lambda spec, tensors: spec.update(before=False),
        lambda spec, tensors: spec.update(before=4),
        lambda spec, tensors: tensors.pop("hand"),
        lambda spec, tensors: tensors.pop("hand_scale"),
        lambda spec, tensors: tensors.update(kv_before_scale=tensors["kv_before_scale"][:1, :1, :1]),
        lambda spec, tensors: tensors.update(kv_scale=tensors["kv_scale"][..., :1]),
        lambda spec, tensors: tensors.update(norm_scale=tensors["norm"] * 2),
    ],
)
def test_files_that_contradict_themselves_are_refused(change, tmp_path):
    save_swiftkv_adapter(swiftkv_for(model_of(), before=5), tmp_path)
    changed(tmp_path, change)
    with pytest.raises(AdapterFileError):
        load_swiftkv_adapter(tmp_path)


@pytest.mark.parametrize("before", [-1, 65, 1.5, True])
def test_numbers_that_no_cache_could_hold_are_refused(before):
    with pytest.raises(ConfigError, match="0 to 64 numbers"):  # two heads of 16 elements, as keys and as values
        initial(model_of(), 2, before=before)


def test_what_has_no_place_in_a_published_checkpoint_is_not_exported(tmp_path):
    model = model_of()
    with pytest.raises(UnsupportedModelError, match="no published layout"):
        save_published(model, swiftkv_for(model, before=5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_of_a_transform_that_hands_nothing_on_do_not_fit_one_that_does():
    model = model_of()
    plain, handing = swiftkv_for(model, seed=3), swiftkv_for(model, before=5, seed=3)
    with torch.no_grad():
        handing.transform.kv.copy_(plain.transform.kv)
    with pytest.raises(AdapterMismatchError, match=r"group 1\) than swift \(K=2, group 1, before=5"):
        attach(model, [handing, gates_for(model, plain.transform)])
    attach(model, [handing, gates_for(model, handing.transform)])


def test_published_start_hands_on_what_nothing_is_made_of():
    model, ids = model_of(), tokens(1, 60)
    found = []
    for before in (0, 7):
        attach(model, SwiftKVAdapter("start", initial(model, 2, before=before), fingerprint(model)))
        found.append(full(model, ids))
    assert torch.equal(*found)
    assert initial(model, 2, before=7).hand.abs().min() > 0, "or nothing could be learned"


def test_crop_and_fork_go_on_from_the_token_before():
    model, ids = model_of(), tokens(1, 90)
    attach(model, swiftkv_for(model, before=40), chunk=16)
    expected = full(model, ids)
    cache = KVCache(model)
    with torch.no_grad():
        model(tokens(1, 70, seed=5), past_key_values=cache)
        cache.crop(-70)
        model(ids[:, :50], past_key_values=cache)
        model(tokens(1, 20, seed=6), past_key_values=cache)
        cache.crop(-20)
        twin = copy.deepcopy(cache)
        for each in (cache, twin):
            got = model(ids[:, 50:], past_key_values=each).logits
            torch.testing.assert_close(got, expected[:, 50:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1])
def test_what_only_the_layer_of_the_handed_lost_does_not_keep_from_taking_back(shift):
    model, ids = model_of(), tokens(1, 420)
    attach(model, pair(model, 2, True, before=40, shift=shift, rate=-50.0))  # gates that mark nothing
    expected, cache = full(model, ids), KVCache(model)
    with torch.no_grad():
        model(tokens(1, 399), past_key_values=cache)
        model(ids[:, 399:], past_key_values=cache)
        for remove in (15, 3):
            cache.crop(-remove)
            now = cache.seen
            got = model(ids[:, now:], past_key_values=cache).logits
            torch.testing.assert_close(got, expected[:, now:], rtol=0, atol=1e-4)
        with pytest.raises(CacheStateError, match="already evicted"):
            cache.crop(-200)


def test_a_forward_that_fails_leaves_what_was_handed_on():
    model, ids = model_of(), tokens(1, 60)
    attach(model, pair(model, 2, True, before=40), chunk=16)
    expected, cache = full(model, ids), KVCache(model)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        handle = model.model.layers[4].mlp.register_forward_hook(lambda *args: 1 / 0)
        for columns in (1, 3, 15):
            with pytest.raises(ZeroDivisionError):
                model(tokens(1, columns, seed=9), past_key_values=cache)
        handle.remove()
        got = model(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 40:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("held", "rounds"),
    [(100, [(0, 7)]), (2, [(0, 2), (2, 4), (4, 7)]), (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 7)])],
)
def test_what_is_handed_on_is_stored_with_the_last_layer(held, rounds, monkeypatch):
    model, ids, found = model_of(), tokens(1, 128), []
    attach(model, swiftkv_for(model, 2, before=40), chunk=64)
    cache, store = KVCache(model), chunk_step.ChunkStep._store_layers
    layer = 2 * cache.shape.kv_heads * 64 * cache.shape.head_dim * 4  # bytes of its keys and values in a chunk

    def noted(step, layers, *tensors):
        found.append((layers.start, layers.stop))
        store(step, layers, *tensors)

    monkeypatch.setattr(chunk_step, "HELD", held * layer)
    monkeypatch.setattr(chunk_step.ChunkStep, "_store_layers", noted)
    with torch.no_grad():  # no later layer runs for the first chunk, all for the last token of the second
        model(ids, past_key_values=cache, logits_to_keep=1)
    assert found == [*rounds, *rounds]


def test_codes_in_pages_round_what_is_handed_on_and_no_more():
    model, ids = model_of(), tokens(1, 60)
    attach(model, swiftkv_for(model, before=40), kv_dtype="int8")
    expected, cache = full(model, ids), KVCache(model)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        got = model(ids[:, 40:], past_key_values=cache).logits
    assert (got - expected[:, 40:]).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("before", [0, 5])
def test_similar_prompts_are_put_together_where_nothing_is_handed_on(before):
    store = ReuseStore("20MB", shortest=8, similar=SimilarSettings(least=8, first=4, last=0, most=1.0, audit=0.0))
    model = attach(model_of(), swiftkv_for(model_of(), before=before), reuse=store)
    text = tokens(1, 120)
    prompts = text, torch.cat([tokens(1, 9, seed=4), text[:, 20:]], 1)
    for prompt in prompts:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert ("similar" in store.explain(prompts[1]).reason) == (before == 0)
    assert store.stats().similar_hits == (before == 0)
