"""Gemma's pictures, whose tokens see each other in both directions: in some layers of Gemma 4, in all of Gemma 3."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
)

from octavo import KVCache, attach
from octavo.attachment.masks import mask
from octavo.errors import UnsupportedModelError
from tiny import tiny_adapter, tokens
from tiny_decoders import tiny_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
KINDS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}  # and what tells pictures from text
GREEDY = {"max_new_tokens": 10, "do_sample": False}
WINDOW = 12  # of the layers that have one


def gemma(kind, **changes):
    """A tiny model that reads pictures, with full layers and windows."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    if kind == "gemma3":
        config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2
    else:  # which has such layers already; in small Gemmas 4 pictures are as text
        config.text_config.use_bidirectional_attention = "vision"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.05 if kind == "gemma4" else 0.1)
    return model


def prompt(kind, padded=False):
    """Two rows of text with pictures, of which one is longer than the windows. What pictures look like is left out:
    their tokens' embeddings are those of words."""
    ids, types, mask = tokens(2, 40), torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    types[:, 9:13] = 1
    types[0, 17:35], types[1, 33:40] = 1, 1
    mask[0, : 6 * padded] = 0
    return {"input_ids": ids, KINDS[kind]: types, **({"attention_mask": mask} if padded else {})}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_unattached_model(kind, padded):
    model, given = gemma(kind), prompt(kind, padded)
    real = given.get("attention_mask", torch.ones(2, 40)).bool()
    if padded:
        given["position_ids"] = given["attention_mask"].cumsum(1).sub(1).clamp(0)
    causal = {name: value for name, value in given.items() if name != KINDS[kind]}
    with torch.no_grad():
        expected, answer = model(**given).logits[real], model.generate(**given, **GREEDY)
        assert (model(**causal).logits[real] - expected).abs().max() > 0.01
        attach(model, chunk=16)
        torch.testing.assert_close(model(**given).logits[real], expected, **CLOSE)
        torch.testing.assert_close(model(**given, use_cache=False).logits[real], expected, **CLOSE)
        cache = KVCache(model)
        assert torch.equal(model.generate(**given, past_key_values=cache, **GREEDY), answer)
    assert cache.seen == 49
    held = cache.kept[:, 0]  # of a layer with a window
    assert held.max() == WINDOW - 1


@pytest.mark.parametrize("kind", KINDS)
def test_gates_evict_as_under_the_hard_mask(kind):
    model, given = gemma(kind), prompt(kind)
    attach(model, tiny_adapter(model, window=5), chunk=16)
    with torch.no_grad():
        hard, cache = model(**given, use_cache=False).logits, KVCache(model)
        torch.testing.assert_close(model(**given, past_key_values=cache).logits, hard, **CLOSE)
        more = tokens(2, 6, seed=4)
        ids = torch.cat([given["input_ids"], more], 1)
        types = torch.nn.functional.pad(given[KINDS[kind]], (0, 6))
        whole = model(ids, **{KINDS[kind]: types}, use_cache=False).logits[:, 40:]
        steps = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(6)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
        attach(model)
        assert (model(**given).logits - hard).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_pictures_whole(kind):
    model, given = gemma(kind).train(), prompt(kind)
    found = []
    for attached in (False, True):
        if attached:
            attach(model)
        model.zero_grad()
        loss = model(**given, labels=given["input_ids"], use_cache=False).loss
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_pixels_come_in_as_they_do_unattached(full):
    model, piece = gemma("gemma3", mm_tokens_per_image=4, image_token_id=90), 90
    ids = tokens(1, 30) % piece
    ids[:, 11:15] = piece
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "token_type_ids": (ids == piece).long(), "pixel_values": pixels}
    with torch.no_grad():
        expected, answer = model(**given).logits, model.generate(**given, **GREEDY)
        assert (model(**{**given, "pixel_values": -pixels}).logits - expected).abs().max() > 0.01
        attach(model, chunk=16)
        torch.testing.assert_close(model(**given).logits, expected, **CLOSE)
        assert torch.equal(model.generate(**given, **GREEDY), answer)
        if full:  # which compiles the part that sees
            compiled = torch.compile(model, backend="eager")
            torch.testing.assert_close(compiled(**given, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_text_whatever_tells_its_tokens(kind):
    model, given = gemma(kind), prompt(kind)
    given[KINDS[kind]].zero_()
    with torch.no_grad():
        expected = model(**given).logits
        attach(model, chunk=16)
        torch.testing.assert_close(model(**given).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_in_a_later_turn_is_refused_before_anything_is_written(kind):
    model, given = attach(gemma(kind), chunk=16), prompt(kind)
    with torch.no_grad():
        cache = KVCache(model)
        model(given["input_ids"], past_key_values=cache)
        later = {**given, KINDS[kind]: torch.nn.functional.pad(given[KINDS[kind]], (40, 0))}
        with pytest.raises(UnsupportedModelError, match="at the beginning of a text alone"):
            model(**later, past_key_values=cache)
    assert cache.seen == 40


def test_pictures_are_told_where_tracing_parts_documents_that_are_one(full):
    model, given = gemma("gemma4"), prompt("gemma4")
    config, documents = model.config.text_config, torch.zeros(2, 40, dtype=torch.long)
    blocks = torch.where(given["mm_token_type_ids"] == 1, 0, -1)
    seen = or_masks(causal_mask_function, blockwise_overlay(blocks))
    made = mask(mask_function=and_masks(packed_sequence_mask_function(documents), seen), config=config)
    assert torch.equal(made, torch.where(blocks == 0, 2, 1))
    documents[1, 20:] = 1
    with pytest.raises(UnsupportedModelError, match="packed"):
        mask(mask_function=and_masks(packed_sequence_mask_function(documents), seen), config=config)
    if full:  # whose graph breaks at the masks
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            expected = model(**given).logits
            attach(model, chunk=16)
            torch.testing.assert_close(compiled(**given, use_cache=False).logits, expected, **CLOSE)
