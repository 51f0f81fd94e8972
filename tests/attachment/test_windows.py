"""Models whose layers have windows, softcapping or sinks: attached they are what they are unattached."""

import pytest
import torch

from octavo import ReuseStore, attach, detach
from octavo.attachment import KVCache, Snapshot, attachment_of
from octavo.errors import UnsupportedModelError
from tiny import SHAPE, feed, tiny_adapter, tiny_model, tokens
from tiny_windows import WINDOW, WINDOWED, windowed_model

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 0, "atol": 1e-4}
LENGTH, NEW = 61, 12


def padded(batch):
    """(ids, mask) of prompts longer than the window; in a batch the first is shorter and padded on the left."""
    ids, mask = tokens(batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.int64)
    if batch > 1:
        ids[0, :25], mask[0, :25] = 0, 0
    return ids, mask


def answers(model, ids, mask, **more):
    """(logits of the prompt, tokens generated, their logits)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).logits
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, output_logits=True,
            return_dict_in_generate=True, **more,
        )  # fmt: skip
    return logits[mask.bool()], out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", WINDOWED)
def test_attached_is_unattached(family):
    """Cached in chunks, decoded, and without a cache."""
    model = windowed_model(family)
    for batch, chunk in ((1, 512), (2, 16)):
        ids, mask = padded(batch)
        expected = answers(model, ids, mask)
        attach(model, chunk=chunk)
        cache = KVCache(model)
        got = answers(model, ids, mask, past_key_values=cache)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            uncached = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        detach(model)
        assert torch.equal(got[1], expected[1])
        for ours, theirs in zip(got[::2], expected[::2], strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(uncached[mask.bool()], expected[0], **CLOSE)
        assert cache.kept.amin() <= WINDOW


def test_gates_only_shorten_and_a_snapshot_goes_on():
    model, ids = windowed_model("qwen3"), tokens(1, LENGTH)
    attach(model, tiny_adapter(model, window=20), chunk=16)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    got, cache = feed(model, ids[:, :-4], 40)
    torch.testing.assert_close(got, expected[:, :-4], **CLOSE)
    kept = cache.kept[0]
    assert kept[[0, 2]].amax() <= WINDOW - 1 < kept[1].amin() < LENGTH - 8
    twin = KVCache.restore(model, Snapshot.from_bytes(cache.snapshot().to_bytes()))
    assert torch.equal(twin.kept, cache.kept)
    with torch.no_grad():
        for i in range(4, 0, -1):
            last = model(ids[:, LENGTH - i : LENGTH - i + 1], past_key_values=twin).logits
            torch.testing.assert_close(last[:, 0], expected[:, -i], **CLOSE)


def test_a_window_that_never_ends_is_full_attention():
    model = windowed_model("mistral", sliding_window=SHAPE["max_position_embeddings"])
    cache = KVCache(attach(model))
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    assert not cache.shape.windowed
    assert bool((cache.kept == 30).all())


@pytest.mark.parametrize(
    ("reason", "family", "more"),
    [
        ("a ReuseStore cannot keep", "gemma3", {"reuse": ReuseStore("1MB")}),
        ("shift 1", "qwen3", {"shift": 1}),
    ],
)
def test_what_windows_do_not_go_with_is_refused(reason, family, more):
    model = windowed_model(family)
    shift = more.pop("shift", None)
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model, tiny_adapter(model, shift=shift) if shift else None, **more)
    assert attachment_of(model) is None


def test_gates_of_unequal_heads_are_refused_where_snapshots_would_lose_marked_tokens():
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.num_key_value_groups = 6  # one KV head instead of two
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(96, 16, bias=False))
    assert attachment_of(attach(model)).layout.heads == (2, 1, 2)
    for shift, options in ((0, {"reuse": ReuseStore("1MB")}), (1, {})):
        with pytest.raises(UnsupportedModelError, match="unequal heads"):
            attach(model, tiny_adapter(model, shift=shift), **options)
    assert attach(model, reuse=ReuseStore("1MB")) is model
    assert not attachment_of(attach(model, tiny_adapter(model), cuda_graphs=True)).captures
