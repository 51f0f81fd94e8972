"""Every decoder class of transformers: what docs/models.md and `octavo models` say of it is so."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, GptOssConfig

from decoder_walk import MOST_RUN, PAGE, RECORD, outcome, page
from octavo import KVCache, attach
from tiny_decoders import KINDS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
RECORDED = json.loads(RECORD.read_text())
BY_TYPE = {each["type"]: each for each in RECORDED["classes"]}
REPRESENTATIVES = [  # one of each layout: what is new here beside tests/attachment/test_windows.py
    "gpt2", "opt", "stablelm", "llama4_text", "mimo_v2_flash", "gemma4_text", "gemma3", "falcon_h1", "qwen3_next",
    "lfm2", "zamba2", "jamba", "bloom", "deepseek_v3", "bert", "mamba", "doge", "moshi", "whisper", "inkling_text",
]  # fmt: skip
same_version = pytest.mark.skipif(
    transformers.__version__ != RECORDED["transformers"], reason="docs/models.md is of another version of transformers"
)


def test_the_page_is_made_of_the_record_and_most_of_what_people_run_is_exact():
    assert PAGE.read_text() == page(RECORDED)
    assert {each["outcome"] for each in RECORDED["classes"]} == {"exact", "refused", "no model"}
    assert all(each["why"] for each in RECORDED["classes"] if each["outcome"] != "exact")
    assert len(set(MOST_RUN)) == 60
    assert sum(BY_TYPE[kind]["outcome"] == "exact" for kind in MOST_RUN) >= 50


@same_version
@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_the_record_is_true_of_one_of_each_layout(kind):
    found = outcome(kind, chunks=(16,), batches=(2,))
    assert found.status == BY_TYPE[kind]["outcome"], found.why
    if found.status == "refused":
        assert " ".join(found.why.split()) == BY_TYPE[kind]["why"]


@same_version
def test_the_record_is_true_of_all(full):
    if not full:
        pytest.skip("the whole walk takes minutes: --full")
    assert sorted(BY_TYPE) == KINDS
    found = {kind: outcome(kind) for kind in KINDS}
    assert {k: o.status for k, o in found.items()} == {k: each["outcome"] for k, each in BY_TYPE.items()}


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "max_position_embeddings": 32768, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SHAPES = {  # keys and values as in Gemma 3 1B and gpt-oss-20b, and as little of the rest as there can be
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512
    ),
    "gpt-oss": lambda: GptOssConfig(
        **SIZES, **EXPERTS, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        sliding_window=128,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SHAPES)
def test_windows_hold_hardly_more_bytes_than_a_dynamic_cache_that_frees_them(family, full):
    """At most 1.05 times at 8,000 tokens; at 700, where windows and their pages weigh more, 1.12 times."""
    length, most = (8000, 1.05) if full else (700, 1.12)
    model = AutoModelForCausalLM.from_config(SHAPES[family](), dtype=torch.bfloat16).eval()
    ids = torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = DynamicCache(config=model.config)
        for part in ids.split(500, 1):
            model.model(part, past_key_values=dense)
        theirs = sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values))
        cache = KVCache(attach(model))
        model.model(ids, past_key_values=cache)
    print(f"{family}, {length:,} tokens: {cache.nbytes / theirs:.3f} times {theirs:,} bytes")
    assert cache.dense_nbytes == theirs
    assert cache.nbytes <= most * theirs
