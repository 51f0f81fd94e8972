"""Tiny SwiftKV checkpoints in exactly the published layout, every name spelled out; nothing of Octavo writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo.attachment.supported import fingerprint
from octavo.swiftkv import SwiftKVAdapter, initial
from tiny import tokens

IDS = tokens(2, 24)
NORM = "model.norm_swiftkv.weight"
Q1, Q2 = "model.layers.1.self_attn.q_proj_swiftkv", "model.layers.2.self_attn.q_proj_swiftkv"
K1, K2 = "model.layers.1.self_attn.k_proj_swiftkv", "model.layers.2.self_attn.k_proj_swiftkv"
V1, V2 = "model.layers.1.self_attn.v_proj_swiftkv", "model.layers.2.self_attn.v_proj_swiftkv"


def transformed(model, group=1, kv_layers=1):
    """An adapter whose transform does something, biases included."""
    transform = initial(model, kv_layers, group)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return SwiftKVAdapter("ours", transform, fingerprint(model))


def by_hand(adapter) -> dict[str, torch.Tensor]:
    """The transform's tensors under their published names, for three layers, K = 1, groups of 1 or 2."""
    transform = adapter.transform
    state = {NORM: transform.norm, f"{Q1}.weight": transform.q[0], f"{Q2}.weight": transform.q[1]}
    state |= {f"{K1}.weight": transform.kv[0, 0], f"{V1}.weight": transform.kv[1, 0]}
    if transform.spec.bias:
        state |= {f"{Q1}.bias": transform.q_bias[0], f"{Q2}.bias": transform.q_bias[1]}
        state |= {f"{K1}.bias": transform.kv_bias[0, 0], f"{V1}.bias": transform.kv_bias[1, 0]}
    if transform.spec.group == 1:
        state |= {f"{K2}.weight": transform.kv[0, 1], f"{V2}.weight": transform.kv[1, 1]}
        if transform.spec.bias:
            state |= {f"{K2}.bias": transform.kv_bias[0, 1], f"{V2}.bias": transform.kv_bias[1, 1]}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def publish(folder: Path, model, adapter, *, shards=1, **settings) -> Path:
    """Write the folder as the published ones are: fp32 files, no `swiftkv` flag; `settings` change config.json."""
    family = model.config.model_type
    folder.mkdir()
    state = {**model.state_dict(), **by_hand(adapter)}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    config = json.loads(model.config.to_json_string(use_diff=False))
    rope = config.pop("rope_parameters")
    del config["dtype"]
    config |= {
        "architectures": [f"{family.capitalize()}SwiftKVForCausalLM"],
        "model_type": f"{family}_swiftkv",
        "num_key_value_layers": adapter.transform.spec.kv_layers,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
    }
    if adapter.transform.spec.group > 1:
        config["key_value_group_size"] = adapter.transform.spec.group
    config |= settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits
