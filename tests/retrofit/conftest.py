"""A tiny model with the default model's tokenizer, and text to train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from octavo.retrofit.data import Source


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from octavo.models import default_model
    from octavo.models.gguf import unpacked_gguf

    return AutoTokenizer.from_pretrained(unpacked_gguf(Path(default_model())))


@pytest.fixture
def student() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def source() -> Source:
    tokens = np.random.default_rng(0).integers(5, 49000, 4000).astype(np.uint16)
    return Source("random", tokens, None, 1.0)
