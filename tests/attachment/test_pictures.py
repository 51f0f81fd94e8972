"""Decoders of models that read pictures: positions have several axes, and what pictures add goes to its tokens."""

import pytest
import torch

from octavo import KVCache, ReuseStore, attach, detach
from octavo.attachment import attachment_of
from octavo.errors import UnsupportedModelError
from tiny import tokens
from tiny_pictures import KINDS, PICTURE, picture_model


def prompt(picture):
    """A prompt over two chunks of 16 tokens, one row padded, or one whose picture lies across the first two."""
    if not picture:
        ids, mask = tokens(2, 40) % PICTURE, torch.ones(2, 40, dtype=torch.long)
        mask[0, :7] = 0
        return {"input_ids": ids, "attention_mask": mask}
    ids = tokens(1, 40) % PICTURE
    ids[:, 13], ids[:, 14:18], ids[:, 18] = 92, PICTURE, 93
    pixels = torch.randn(16, 3 * 16, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == PICTURE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_over_one_chunk_is_what_the_unattached_model_reads(kind, picture):
    model, inputs = picture_model(kind), prompt(picture)
    options = {"do_sample": False, "max_new_tokens": 8}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, answer = model(**inputs).logits[real], model.generate(**inputs, **options)
        attach(model if picture else model.model.language_model, chunk=16)
        torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=0, atol=1e-4)
        assert torch.equal(model.generate(**inputs, **options), answer)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_cut_along_tokens_not_along_sequences(kind, axes):
    decoder, ids = picture_model(kind).model.language_model, tokens(3, 40)
    positions = torch.arange(40).expand(axes, 3, 40) + torch.arange(axes)[:, None, None]
    with torch.no_grad():
        expected = decoder(ids, position_ids=positions).last_hidden_state
        got = attach(decoder, chunk=16)(ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_attached_at_its_language_model(kind):
    model, ids = picture_model(kind), tokens(1, 30)
    attach(model, chunk=16)
    assert attachment_of(model) is attachment_of(model.base_model.language_model)
    cache = KVCache(model)
    model.generate(ids % PICTURE, past_key_values=cache, do_sample=False, max_new_tokens=3)
    assert cache.seen == 32
    assert attachment_of(detach(model)) is None
    assert model.base_model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(UnsupportedModelError, match="reads more than text"):
        attach(model, reuse=ReuseStore())
