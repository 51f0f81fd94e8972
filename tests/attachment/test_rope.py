"""RoPE whose frequencies change with the length of the text, past the lengths at which they do."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config

from octavo import LLM, KVCache, SamplingParams, attach
from octavo.errors import PromptError
from tiny import SHAPE, tiny_adapter, tiny_model, tokens

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 0, "atol": 1e-4}
LIMIT = 30
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": LIMIT}
DYNAMIC = {
    **SHAPE,
    "max_position_embeddings": LIMIT,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
ROPES = {
    "dynamic": lambda: LlamaConfig(**DYNAMIC),
    "longrope": lambda: Phi3Config(
        **SHAPE, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
        original_max_position_embeddings=LIMIT,
    ),
}  # fmt: skip
GREEDY = {"do_sample": False, "max_new_tokens": 20}


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("prompt", [20, LIMIT, LIMIT + 1, 60])
@pytest.mark.parametrize("rope", ROPES)
def test_answers_are_those_of_the_unattached_model(rope, prompt):
    ours, theirs = tiny_model(ROPES[rope]), tiny_model(ROPES[rope])  # each remembers how far it has got
    attach(ours, chunk=16)
    with torch.no_grad():
        for ids in (tokens(1, prompt), tokens(2, prompt, seed=3), tokens(1, 10)):
            assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
            assert torch.equal(ours.generate(**padded(ids), **GREEDY), theirs.generate(**padded(ids), **GREEDY))


@pytest.mark.parametrize("rope", ROPES)
def test_tokens_read_one_by_one_keep_the_frequencies_that_they_were_read_at(rope):
    ours, theirs, ids = tiny_model(ROPES[rope]), tiny_model(ROPES[rope]), tokens(2, 50)
    attach(ours, chunk=16)
    past, cache, got, expected = None, KVCache(ours), [], []
    with torch.no_grad():
        for first, last in ((0, 25), *((i, i + 1) for i in range(25, 40)), (40, 50)):
            out = theirs(ids[:, first:last], past_key_values=past, use_cache=True)
            past = out.past_key_values
            expected.append(out.logits)
            got.append(ours(ids[:, first:last], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), **CLOSE)


@pytest.mark.parametrize("rope", ROPES)
def test_gates_evict_past_the_limit_as_under_the_hard_mask(rope):
    model, ids = tiny_model(ROPES[rope]), tokens(2, 60)
    attach(model, tiny_adapter(model, window=6), chunk=16)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=KVCache(model)).logits, expected, **CLOSE)


@pytest.mark.parametrize("rope", ROPES)
def test_the_engine_ends_where_texts_can_no_longer_be_read_in_pieces(rope):
    model, ids = attach(tiny_model(ROPES[rope]), chunk=16), tokens(1, 20)
    llm = LLM(model, tokenizer=None)
    (out,) = llm.generate([ids[0].tolist()], SamplingParams(temperature=0.0, max_tokens=20))
    assert out.tokens == model.generate(ids, do_sample=False, max_new_tokens=20)[0, 20:LIMIT].tolist()
    with pytest.raises(PromptError, match=f"the model has {LIMIT} positions, past which its RoPE changes"):
        llm.generate([tokens(1, LIMIT)[0].tolist()])


def test_a_window_as_long_as_dynamic_rope_s_limit_is_one():
    ours, theirs = (tiny_model(lambda: MistralConfig(**DYNAMIC, sliding_window=LIMIT)) for _ in range(2))
    ids = tokens(1, 60)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(attach(ours, chunk=16)(ids).logits, expected, **CLOSE)
