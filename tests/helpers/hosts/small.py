"""Tiny models of Transformers with random weights: what becomes a MoE in place."""

import torch
import transformers
from transformers.models.auto import CONFIG_MAPPING


TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
QWEN_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "window_size": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION_TOKENS = {
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 103,
    "vision_end_token_id": 104,
}

FIELDS = {
    "llama": ("LlamaForCausalLM", TEXT),
    "mixtral": (
        "MixtralForCausalLM",
        {**TEXT, "num_hidden_layers": 2, "num_local_experts": 6, "num_experts_per_tok": 3},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP, "image_token_index": 100},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": ROPE},
            "vision_config": QWEN_TOWER,
            **VISION_TOKENS,
        },
    ),
}


def fields_of(model_type: str, **changes) -> dict:
    """Return the fields of a config, those of the decoder changed."""
    fields = {"model_type": model_type, **FIELDS[model_type][1]}
    fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    if "text_config" in fields:
        return {**fields, "text_config": {**fields["text_config"], **changes}}
    return {**fields, **changes}


def small_host(model_type: str, seed: int = 0, **changes):
    """Return a model in evaluation mode, with weights that show in its logits."""
    fields = fields_of(model_type, **changes)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    torch.manual_seed(seed)
    model = getattr(transformers, FIELDS[model_type][0])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()
