"""Tiny random Qwen models that read pictures and text."""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tiny import SHAPE

PICTURE = 90  # the token that stands for a piece of a picture
_MARKS = {"image_token_id": PICTURE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
_TEXT = {**SHAPE, "head_dim": 16, "use_sliding_window": False, "rope_parameters": _ROPE}
_SIZES = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 96}
_VISION = {**_SIZES, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}


def qwen2_5_vl():
    vision = {**_VISION, "fullatt_block_indexes": [1], "window_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=_TEXT, vision_config=vision, **_MARKS))


def qwen3_vl():
    vision = {**_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=_TEXT, vision_config=vision, **_MARKS))


KINDS = {"qwen2.5": qwen2_5_vl, "qwen3": qwen3_vl}


def picture_model(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    return model
