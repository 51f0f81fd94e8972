"""Tiny random models of every tested family, and gates that evict."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from octavo.attachment import KVCache
from octavo.attachment.layout import joined
from octavo.attachment.supported import fingerprint, shape_of
from octavo.config import Eviction
from octavo.dms import Adapter, Gates, GateSpec

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24),
}


def tiny_model(family: Any = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a family, by its name in FAMILIES or what makes its configuration."""
    torch.manual_seed(seed)
    config = FAMILIES[family]() if isinstance(family, str) else family()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():  # larger weights than the default, so that what is evicted matters
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    return model


def tiny_adapter(
    model: PreTrainedModel, window: int = 20, shift: int = 0, granularity: Any = "head", rate: float = 0.5
) -> Adapter:
    """Random gates that mark about `rate` of the tokens."""
    shape = shape_of(joined(model).config)
    spec = GateSpec(
        shape["num_hidden_layers"],
        shape["hidden_size"],
        shape["num_key_value_heads"],
        Eviction(window, shift),
        granularity=granularity,
    )
    gates = Gates(spec)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        gates.weight.normal_(0, 0.1, generator=generator)
        gates.bias.fill_(spec.offset / spec.scale + (rate - 0.5))
    return Adapter("tiny", gates, fingerprint(model), 2.0)


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def attention_of(model: PreTrainedModel) -> list[Any]:
    """The attention modules of all layers."""
    return [layer.self_attn for layer in model.model.layers]


def in_pieces(
    model: PreTrainedModel, ids: torch.Tensor, pieces: Sequence[int], mask: torch.Tensor | None = None
) -> Any:
    """Logits of all tokens [B, T, vocab] from pieces of so many columns each, padded as `mask` says; and the cache."""
    cache, parts, first = KVCache(model), [], 0
    with torch.no_grad():
        for columns in pieces:
            seen = None if mask is None else mask[:, : first + columns]
            parts.append(model(ids[:, first : first + columns], attention_mask=seen, past_key_values=cache).logits)
            first += columns
    return torch.cat(parts, 1), cache


def check_answers(model: PreTrainedModel, requests: Sequence[Any]) -> None:
    """An engine's greedy requests, which end at no token, have got what `generate` answers to each alone."""
    for request in requests:
        ids, count = torch.tensor([request.prompt], device=model.device), request.params.max_tokens
        whole = model.generate(ids, do_sample=False, max_new_tokens=count, min_new_tokens=count)
        assert request.output.tokens == whole[0, ids.shape[1] :].tolist()


def feed(model: PreTrainedModel, ids: torch.Tensor, prompt: int, cache: KVCache | None = None) -> Any:
    """Logits of all tokens [B, T, vocab] from a prefill of `prompt` tokens and single steps; and the cache."""
    cache = cache or KVCache(model)
    with torch.no_grad():
        parts = [model(input_ids=ids[:, :prompt], past_key_values=cache).logits]
        for i in range(prompt, ids.shape[1]):
            parts.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1), cache
