"""Models whose layers have windows, softcapping or sinks: attached they are what they are unattached."""

import pytest
import torch

from octavo import attach, detach
from octavo.attachment import KVCache
from tiny import tokens
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
    model = windowed_model(family)
    for batch in (1, 2):
        ids, mask = padded(batch)
        expected = answers(model, ids, mask)
        for chunk in (16, 512):
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
