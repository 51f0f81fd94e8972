"""Tiny random models of every decoder class that AutoModelForCausalLM knows."""

import copy
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW, VOCABULARY, LAYERS, MOST = 12, 97, 4, 20_000_000
SHARED = ["sliding_attention", "full_attention"] * 3
SIZES: list[tuple[Any, str]] = [  # a small value, and by which names configurations have it
    (VOCABULARY, "vocab_size vocab_size_per_layer_input n_words audio_vocab_size"),
    (
        64,
        "hidden_size n_embd d_model embedding_size dim input_embedding_size intermediate_size ffn_dim decoder_ffn_dim",
    ),
    (64, "encoder_ffn_dim d_ff mlp_dim n_inner ffn_hidden_size block_ff_dim dense_intermediate_size"),
    (64, "expert_ffn_hidden_size projection_dim"),
    (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    (32, "shared_intermediate_size intermediate_size_mlp hidden_size_per_layer_input image_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers"),
    (4, "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads num_kv_heads num_global_key_value_heads"),
    (16, "head_dim kv_channels attention_head_dim swa_head_dim v_head_dim swa_v_head_dim global_head_dim"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    (1, "n_group topk_group n_shared_experts num_expert_groups first_k_dense_replace num_dense_layers"),
    (1, "moe_layer_start_index mamba_n_groups mamba_ngroups n_groups num_mem_blocks"),
    (16, "kv_lora_rank q_lora_rank qk_nope_head_dim index_head_dim"),
    (8, "qk_rope_head_dim index_topk patch_size mamba_n_heads n_mamba_heads mamba_num_heads"),
    (2, "index_n_heads linear_num_key_heads mamba_num_groups mamba_expand expand altup_num_inputs max_window_layers"),
    (4, "linear_num_value_heads linear_num_heads mamba_dt_rank laurel_rank"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size state_size"),
    (16, "mamba_headdim mamba_head_dim mamba_d_head mamba_chunk_size chunk_size"),
    (128, "mamba_d_ssm lru_width"),
    (True, "use_sliding_window"),
    (0, "pad_token_id num_kv_shared_layers"),
    (1, "bos_token_id"),
    (None, "eos_token_id sep_token_id"),
]
SMALL = {name: value for value, names in SIZES for name in names.split()}
HYBRID = ["linear_attention", "full_attention"] * 2
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
LATENT_KINDS = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite glm_moe_dsa longcat_flash "
    "minicpm3 youtu"
)
SPECIAL: dict[str, dict[str, Any]] = {  # what a type needs to be as it is published, or to be tiny at all
    **dict.fromkeys(LATENT_KINDS.split(), LATENT),
    "bailing_hybrid": {"layer_types": HYBRID, "layer_group_size": 2, "num_key_value_heads": 4, "num_shared_experts": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "falcon": {"new_decoder_architecture": True},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 6, "layer_types": SHARED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID, "num_key_value_heads": 4, "q_lora_rank": None, "num_shared_experts": 1},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"eos_token_id": 2, "sep_token_id": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 1, "ple_embed_dim": 32,
        "ngram_vocab_size_base": 50, "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "zamba": {
        "num_hidden_layers": 9, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_hidden_size": 128,
        "attention_head_dim": 32, "n_mamba_heads": 2, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "attention_head_dim": 32,
        "attention_hidden_size": 128, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: str) -> Any:
    """A configuration of a model type in which everything that has a size is small."""
    made = CONFIG_MAPPING[kind]
    given = {**_small(made), **SPECIAL.get(kind, {})}
    for name, sub in (getattr(made, "sub_configs", None) or {}).items():
        if name not in given:
            whole = sub if getattr(sub, "model_type", None) else type(getattr(made(), name, None))
            if whole is not type(None):
                given[name] = _small(whole)
    return made(**given)


def _small(made: Any) -> dict[str, Any]:
    """What `SMALL` says of the settings of a configuration's class."""
    names = {*getattr(made, "__dataclass_fields__", {}), *inspect.signature(made.__init__).parameters}
    return {name: value for name, value in SMALL.items() if name in names | set(getattr(made, "attribute_map", {}))}


def tiny_decoder(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of a type with random weights. Raises what transformers raises where it cannot be made so."""
    torch.manual_seed(seed)
    config = tiny_config(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if count > MOST:
        raise ValueError(f"with small settings it has {count:,} parameters")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # larger weights than the default, so that what a window hides matters
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.05 if kind.startswith("gemma4") else 0.1)  # whose scores are not scaled
    return model


KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
