"""The models that are measured: the embedded default, or a larger one's shape with random weights.

Random weights decode as fast as trained ones. What they do not have is gates, so these are made up: each head forgets
tokens at random, and how many it keeps is drawn from what the heads of the default model keep under dms-8x, since heads
that differ are what makes attention over pages hard to balance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from octavo.attachment import KVCache, attach, detach
from octavo.attachment.adapters import Named, resolve
from octavo.attachment.supported import fingerprint
from octavo.config import Eviction
from octavo.dms import Adapter, Gates, GateSpec
from octavo.errors import ConfigError
from octavo.models import load_plain

WINDOW = 256
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = ("default", "llama8b")


@dataclass(frozen=True)
class Subject:
    """A model with gates that fit it, and tokens for its prompts, int64 [n]."""

    name: str
    model: PreTrainedModel
    gates: Adapter
    text: torch.Tensor
    random_weights: bool


def subject(shape: str, text: str, device: str, dtype: torch.dtype | None = None) -> Subject:
    """Make or load what `shape` names. Raises ConfigError for an unknown one, and what loading raises."""
    if shape not in SHAPES:
        raise ConfigError(f"--shape takes {' or '.join(SHAPES)}, not {shape!r}")
    default, tokenizer = load_plain(device=device, dtype=dtype)
    gates = _adapter("dms-8x")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if shape == "default":
        return Subject("SmolLM2-135M-Instruct", default, gates, ids, random_weights=False)
    kept = kept_by_head(default, gates, ids[:4000])
    del default
    with torch.device(device):
        made: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**LLAMA_8B), dtype=dtype or torch.bfloat16
        )
    model: PreTrainedModel = made.eval()
    return Subject("Llama-3.1-8B's shape", model, made_up_gates(model, kept), ids, random_weights=True)


def _adapter(name: Named) -> Adapter:
    (found,) = resolve(name)
    assert isinstance(found, Adapter)
    return found


@torch.no_grad()
def kept_by_head(model: PreTrainedModel, gates: Adapter, ids: torch.Tensor) -> list[float]:
    """What share of the tokens older than the window each head of a model keeps, all layers' heads in rising order."""
    attach(model, gates)
    try:
        cache = KVCache(model)
        model(input_ids=ids[None].to(model.device), past_key_values=cache, logits_to_keep=1)
        snapshot = cache.snapshot()
        counts = snapshot.segments[-1].counts.flatten().float()
        return sorted((counts / len(ids)).clamp(0, 1).tolist())
    finally:
        detach(model)


def made_up_gates(model: PreTrainedModel, kept: Sequence[float], seed: int = 0) -> Adapter:
    """Gates whose heads keep shares drawn from `kept`, each token by chance.

    What a gate reads has passed a norm, so its product with a random direction is about normally distributed, and a
    bias sets how often that is exceeded.
    """
    config: Any = model.config
    spec = GateSpec(config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, Eviction(WINDOW))
    rng = torch.Generator().manual_seed(seed)
    gates = Gates(spec)
    shape = spec.layers, spec.outputs
    direction = torch.nn.functional.normalize(torch.randn(*shape, spec.hidden, generator=rng), dim=-1)
    drawn = torch.tensor(kept)[torch.randint(len(kept), shape, generator=rng)].clamp(0.002, 0.998)
    gates.weight.data = direction
    gates.bias.data = spec.offset / spec.scale - torch.special.ndtri(drawn)
    return Adapter("made-up", gates, fingerprint(model), target=1 / float(torch.tensor(kept).mean()))
