"""The adapters that ship, on the default model: pairs are found by name, skipping is exact, off is the base model."""

import pytest
import torch

from octavo import KVCache, attach, detach, set_swiftkv
from octavo.attachment.adapters import resolve, shipped_adapters
from octavo.cli.demo import TEXT
from octavo.errors import AdapterMismatchError


@pytest.fixture(scope="module")
def ids(smollm):
    return smollm[1](TEXT.read_text(), return_tensors="pt", verbose=False)["input_ids"][:, :700]


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize(("name", "skipped"), [("swiftkv", 10), ("swiftkv-half", 15)])
def test_pairs_skip_exactly_and_switch_off_exactly(smollm, ids, name, skipped):
    model = smollm[0]
    base = logits(model, ids)
    swiftkv, gates = resolve(f"{name}+dms-8x")
    window = gates.gates.spec.eviction.window
    assert (swiftkv.name, swiftkv.transform.spec.upper, gates.name) == (name, skipped, "dms-8x")
    try:
        attach(model, [name, "dms-8x"], chunk=256)
        expected, cache = logits(model, ids), KVCache(model)
        with torch.no_grad():
            got = [model(ids[:, :600], past_key_values=cache, logits_to_keep=1).logits]
            got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(600, 620)]
        torch.testing.assert_close(torch.cat(got, 1), expected[:, 599:620], rtol=0, atol=1e-3)
        assert cache.kept.float().mean() < 0.5 * (620 + window), "620 tokens, of which those in the window are kept"
        difference = (expected - base).abs().mean()
        assert 0.05 < difference < 1.5, "trained weights change logits, but not much"
        set_swiftkv(model, False)
        assert torch.equal(logits(model, ids), base)
    finally:
        detach(model)


def test_gates_of_the_base_model_are_refused_on_a_transform(smollm):
    assert shipped_adapters() == [
        "dms-16x", "dms-16x-v1", "dms-16x-v2", "dms-5x", "dms-8x", "dms-8x-v1", "dms-8x-v2", "dms-8x-v3", "swiftkv",
        "swiftkv-half", "swiftkv-v2",
    ]  # fmt: skip
    with pytest.raises(AdapterMismatchError, match="distilled without SwiftKV"):
        attach(smollm[0], ["swiftkv", "dms-16x"])
