"""The models that are measured: the embedded default, or a larger one's shape with random weights.

Random weights decode as fast as trained ones. What they do not have is gates, so these are made up: each head forgets
tokens at random, and how many it keeps is drawn from what the heads of the default model keep under dms-8x-v1, since
heads that differ are what makes attention over pages hard to balance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import octavo
from octavo.attachment.adapters import SHIPPED
from octavo.attachment.supported import fingerprint
from octavo.errors import ConfigError

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = ("default", "llama8b")


@dataclass(frozen=True)
class Subject:
    """A model with gates that fit it, and tokens for its prompts, int64 [n].

    `skipping`: SwiftKV weights, and gates made on them.
    """

    name: str
    model: PreTrainedModel
    gates: Any  # octavo.Adapter
    text: torch.Tensor
    random_weights: bool
    skipping: Sequence[Any] = ()


def subject(shape: str, text: str, device: str | None, dtype: torch.dtype | None = None) -> Subject:
    """Make or load what `shape` names; `device` as in `octavo.load`.

    Raises ConfigError for an unknown shape, and what loading raises.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--shape takes {' or '.join(SHAPES)}, not {shape!r}")
    default, tokenizer = octavo.load(adapter=None, device=device, dtype=dtype)
    octavo.detach(default)
    gates: Any = octavo.load_adapter("dms-8x-v1")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if shape == "default":
        both = octavo.load_adapter("swiftkv-v2"), octavo.load_adapter(SHIPPED / "swiftkv-v2" / "dms-8x")
        return Subject("SmolLM2-135M-Instruct", default, gates, ids, random_weights=False, skipping=both)
    kept = kept_by_head(default, gates, ids[:4000])
    place = default.device
    del default
    with place:
        made: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**LLAMA_8B), dtype=dtype or torch.bfloat16
        )
    model: PreTrainedModel = made.eval()
    made_up = made_up_gates(model, gates, kept)
    skipping = half(model, octavo.load_adapter("swiftkv-v2"), made_up)
    return Subject("Llama-3.1-8B's shape", model, made_up, ids, random_weights=True, skipping=skipping)


def half(model: PreTrainedModel, like: Any, gates: Any) -> tuple[Any, Any]:
    """Random SwiftKV weights, made as `like` is, with which half of the layers are skipped, and these gates on them."""
    config: Any = model.config
    spec = replace(
        like.transform.spec, layers=config.num_hidden_layers, kv_layers=config.num_hidden_layers // 2, group=1,
        hidden=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )  # fmt: skip
    with model.device:
        transform = type(like.transform)(spec).requires_grad_(False)
        for weights in (transform.q, transform.kv):
            weights.normal_(0, config.hidden_size**-0.5)
    swiftkv = octavo.SwiftKVAdapter("half", transform, fingerprint(model))
    return swiftkv, replace(gates, made_on=transform.fingerprint())


@torch.no_grad()
def kept_by_head(model: PreTrainedModel, gates: Any, ids: torch.Tensor) -> list[float]:
    """What share of the tokens older than the window each head of a model keeps, all layers' heads in rising order."""
    octavo.attach(model, gates)
    try:
        cache = octavo.KVCache(model)
        model(input_ids=ids[None].to(model.device), past_key_values=cache, logits_to_keep=1)
        snapshot = cache.snapshot()
        counts = snapshot.segments[-1].counts.flatten().float()
        return sorted((counts / len(ids)).clamp(0, 1).tolist())
    finally:
        octavo.detach(model)


def made_up_gates(model: PreTrainedModel, like: Any, kept: Sequence[float], seed: int = 0) -> Any:
    """An adapter for a model, made as `like` is, whose heads keep shares drawn from `kept`, each token by chance.

    What a gate reads has passed a norm, so its product with a random direction is about normally distributed, and a
    bias sets how often that is exceeded.
    """
    config: Any = model.config
    spec = replace(
        like.gates.spec, layers=config.num_hidden_layers, hidden=config.hidden_size,
        kv_heads=config.num_key_value_heads,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    gates = type(like.gates)(spec)
    shape = spec.layers, spec.outputs
    direction = torch.nn.functional.normalize(torch.randn(*shape, spec.hidden, generator=rng), dim=-1)
    drawn = torch.tensor(kept)[torch.randint(len(kept), shape, generator=rng)].clamp(0.002, 0.998)
    gates.weight.data = direction
    gates.bias.data = spec.offset / spec.scale - torch.special.ndtri(drawn)
    target = 1 / float(torch.tensor(kept).mean())
    return replace(like, name="made-up", gates=gates, fingerprint=fingerprint(model), target=target, card={})
