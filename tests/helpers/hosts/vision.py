"""Tiny hosts that see in ways of their own: Idefics, the Gemma family, and the models with cross-attention."""

import torch

from helpers.hosts.llava import pictures, rows
from helpers.hosts.native import (
    AUDIO,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PLAIN_TOWER,
    SIGLIP,
    VIDEO,
    NativeHost,
    decoder,
    noise,
)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0}
TWO_PICTURES = ([5, *[IMAGE] * 4, 6, *[IMAGE] * 4, 7], [9, *[IMAGE] * 8, 6, 8, 8])


def idefics3(model_type: str, class_name: str) -> NativeHost:
    config = {"text_config": decoder("llama"), "vision_config": PLAIN_TOWER, "image_token_id": IMAGE}
    return NativeHost(
        class_name,
        {"model_type": model_type, **config, "scale_factor": 2},
        rows=TWO_PICTURES,
        media=pictures(2, 3, 16, 16),
    )


def bounded(*words: int) -> list[int]:
    return [words[0], IMAGE_START, *[IMAGE] * 4, IMAGE_END, *words[1:]]


# The last token of a row sees its picture, as every token after it does.
def seen(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape, dtype=torch.long)}


# Patches in one row each, and where in the picture each of them is.
PLACES = torch.tensor([[x, y] for y in range(4) for x in range(4)])
GEMMA4_PICTURES = pictures(16, 48, image_position_ids=PLACES[None])
GEMMA4_VIDEO = {
    "pixel_values_videos": noise(2, 16, 48, seed=5),
    "video_position_ids": PLACES.repeat(2, 1, 1),
    "num_frames_per_video": torch.tensor([2]),
}
LLAMA4_TOWER = {
    **PLAIN_TOWER,
    "model_type": "llama4_vision_model",
    "intermediate_size": 64,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "num_channels": 3,
}

HOSTS = {
    "idefics2": NativeHost(
        "Idefics2ForConditionalGeneration",
        {
            "model_type": "idefics2",
            "text_config": decoder("mistral"),
            "vision_config": PLAIN_TOWER,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            "image_token_id": IMAGE,
        },
        rows=rows(4),
        media=pictures(1, 3, 16, 16),
    ),
    "idefics3": idefics3("idefics3", "Idefics3ForConditionalGeneration"),
    "smolvlm": idefics3("smolvlm", "SmolVLMForConditionalGeneration"),
    "idefics": NativeHost(
        "IdeficsForVisionText2Text",
        {
            "model_type": "idefics",
            "vocab_size": 128,
            "additional_vocab_size": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_layer_interval": 1,
            "pad_token_id": 0,
            "vision_config": {
                "embed_dim": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "use_resampler": False,
        },
        rows=([5, 6, 7, 8], [9, 6, 8, 8, 8, 8]),
        media=tuple(
            lambda picture=picture, length=length: {**picture(), **seen("image_attention_mask", 1, length, 1)}
            for picture, length in zip(pictures(1, 3, 8, 8), (4, 6), strict=True)
        ),
        per_token=("image_attention_mask",),
    ),
    "paligemma": NativeHost(
        "PaliGemmaForConditionalGeneration",
        {
            "model_type": "paligemma",
            "text_config": decoder("gemma"),
            "vision_config": {**SIGLIP, "image_size": 8, "projection_dim": 32},
            "image_token_index": IMAGE,
            "projection_dim": 32,
        },
        rows=([*[IMAGE] * 4, 5, 6, 7], [*[IMAGE] * 4, 9, 6, 8, 8, 8]),
        media=pictures(3, 8, 8),
        type_ids="token_type_ids",
    ),
    "gemma3": NativeHost(
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3",
            "text_config": decoder("gemma3_text", **SLIDING, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE_START,
            "eoi_token_index": IMAGE_END,
            "mm_tokens_per_image": 4,
        },
        rows=(bounded(5, 6, 7), bounded(9, 6, 8, 8, 8)),
        media=pictures(3, 16, 16),
        type_ids="token_type_ids",
    ),
    "gemma4": NativeHost(
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4",
            "text_config": decoder(
                "gemma4_text", **SLIDING, **PER_LAYER, global_head_dim=8, final_logit_softcapping=5.0
            ),
            "vision_config": {
                **{name: value for name, value in PLAIN_TOWER.items() if name != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
        rows=([5, *[IMAGE] * 4, 6, 7, *[VIDEO] * 8], [9, *[IMAGE] * 4, 6, 8, 8]),
        media=(lambda: {**GEMMA4_PICTURES[0](), **GEMMA4_VIDEO}, GEMMA4_PICTURES[1]),
        type_ids="mm_token_type_ids",
    ),
    "mllama": NativeHost(
        "MllamaForConditionalGeneration",
        {
            "model_type": "mllama",
            "text_config": {
                **decoder("mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1]),
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
                "max_num_tiles": 2,
            },
            "image_token_index": IMAGE,
        },
        rows=([IMAGE, 5, 6, 7, 8, 9], [IMAGE, 9, 6, 8, 8, 8, 12, 13]),
        media=tuple(
            lambda picture=picture, length=length: {
                **picture(),
                **seen("aspect_ratio_ids", 1, 1),
                **seen("aspect_ratio_mask", 1, 1, 2),
                **seen("cross_attention_mask", 1, length, 1, 2),
            }
            for picture, length in zip(pictures(1, 2, 3, 16, 16), (6, 8), strict=True)
        ),
        per_token=("cross_attention_mask",),
    ),
    "llama4": NativeHost(
        "Llama4ForConditionalGeneration",
        {
            "model_type": "llama4",
            "text_config": {
                **decoder("llama4_text"),
                "intermediate_size": 24,
                "intermediate_size_mlp": 48,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "no_rope_layers": [1, 0],
                "attention_chunk_size": 64,
                "layer_types": ["chunked_attention", "full_attention"],
            },
            "vision_config": LLAMA4_TOWER,
            "image_token_index": IMAGE,
        },
        rows=rows(4),
        media=pictures(3, 16, 16),
        adopted=True,
        broken="==5.24.*",
        broken_beams="==5.23.*",
    ),
}
