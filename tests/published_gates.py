"""Tiny DMS checkpoints in exactly the published layouts, and their rule spelled out; Octavo takes no part in it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiny import tiny_model, tokens

IDS = tokens(2, 60)
FIELDS = {
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 12,
    "dms_tau": 0.1,
    "dms_alpha_per": "head",
    "dms_separate_alpha": True,
    "dms_cr": 8,
    "dms_disable_eviction": False,
    "dms_paged_attention_block_size": 8,
    "dms_manual_inference_mode": False,
    "dms_chunked_prefill": None,
    "dms_preallocate_for_tokens": 4096,
}
BORROWED = {"dms_separate_alpha": False}


def base(family: str, **changes):
    """A tiny model whose norms differ, as those of trained ones do, and whose RoPE turns the last channel visibly."""
    model = tiny_model(family, rope_parameters={"rope_type": "default", "rope_theta": 30.0}, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def gate_state(model, bias: bool = False) -> dict[str, Tensor]:
    """Random gates that mark about half of the tokens, under the published names."""
    generator, state = torch.Generator().manual_seed(3), {}
    config = model.config
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.dms_proj_alpha"
        state[f"{name}.weight"] = 0.1 * torch.randn(config.num_key_value_heads, config.hidden_size, generator=generator)
        state[f"{name}_norm.weight"] = 1 + 0.4 * torch.randn(config.hidden_size, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(config.num_key_value_heads, generator=generator)
    return state


def publish(folder: Path, model, gates: dict[str, Tensor], **changes) -> tuple[Path, dict[str, Tensor], dict]:
    """Write the folder; (it, all tensors in it, the fields that were written). None leaves a field out."""
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value != "absent"}
    config = json.loads(model.config.to_json_string(use_diff=False))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype") or "float32"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    state = {**model.state_dict(), **gates}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, state, fields


@torch.no_grad()
def published_logits(model, state: dict[str, Tensor], fields: dict) -> Tensor:
    """The published rule, token by token where it can be: logits of IDS by full attention under a mask."""
    config, decoder = model.config, model.model
    B, T = IDS.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group, at = heads // kv_heads, torch.arange(T)
    residual = decoder.embed_tokens(IDS)
    cos, sin = (part[:, None] for part in decoder.rotary_emb(residual, at[None]))

    def rope(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    for i, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        same = torch.nn.Identity()
        normed = layer.input_layernorm(residual)
        parts = [getattr(attention, f"{p}_proj")(normed).view(B, T, -1, attention.head_dim) for p in "qkv"]
        query = getattr(attention, "q_norm", same)(parts[0]).transpose(1, 2)
        key, value = getattr(attention, "k_norm", same)(parts[1]).transpose(1, 2), parts[2].transpose(1, 2)
        name = f"model.layers.{i}.self_attn.dms_proj_alpha"
        borrowed = f"{name}.weight" not in state
        if borrowed:
            alpha = query[:, ::group, :, -1].clone()
            query[:, ::group, :, -1] = 0
        else:
            scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
            read = residual * scale * state[f"{name}_norm.weight"]
            alpha = (read @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)).transpose(1, 2)
        query, key = rope(query), rope(key)
        if borrowed:
            query[:, ::group, :, -1] = 0
        decisions = alpha * fields["dms_alpha_scale"] - fields["dms_initial_alpha_offset"] > 0
        if fields["dms_alpha_per"] == "layer":
            decisions = decisions[:, [0]].expand(B, kv_heads, T)
        evicted = torch.cat([decisions[..., 1:], torch.zeros(B, kv_heads, 1, dtype=torch.bool)], -1)
        behind = at[:, None] - at[None]
        seen = (behind >= 0) & ~((behind > fields["dms_window_size"]) & evicted[:, :, None])
        key, value, seen = (x.repeat_interleave(group, 1) for x in (key, value, seen))
        scores = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(B, T, -1)
        residual = residual + attention.o_proj(out)
        residual = residual + layer.mlp(layer.post_attention_layernorm(residual))
    return model.lm_head(decoder.norm(residual))
