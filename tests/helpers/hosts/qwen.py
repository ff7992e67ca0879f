"""Tiny hosts whose positions have three axes: the Qwen family, GLM-4V and Ernie 4.5-VL."""

import torch

from helpers.hosts.native import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MROPE,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    NativeHost,
    decoder,
    grid,
    noise,
)


INTERLEAVED = {**MROPE, "mrope_interleaved": True}
PATCH = 3 * 2 * 4 * 4  # colours, frames, height, width
TOWER = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
LEARNED_TOWER = {**TOWER, "out_hidden_size": 32, "num_position_embeddings": 64}
DEEPSTACK_TOWER = {**LEARNED_TOWER, "deepstack_visual_indexes": [0, 1]}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0},
}


def bounded(token: int, count: int) -> list[int]:
    return [IMAGE_START, *[token] * count, IMAGE_END]


def small() -> dict[str, torch.Tensor]:
    return grid((1, 4, 4), patch=PATCH)


def wide() -> dict[str, torch.Tensor]:
    return grid((1, 4, 8), patch=PATCH, seed=1)


def film() -> dict[str, torch.Tensor]:
    return grid((2, 4, 4), patch=PATCH, name="video", seed=2)


# Qwen2-VL writes a video as one span, Qwen3-VL as a span for each of its frames with a time stamp between.
ONE_SPAN = ([5, *bounded(IMAGE, 4), 6, 7, *bounded(VIDEO, 8), 8], [9, *bounded(IMAGE, 8), 6])
STAMPED = ([5, *bounded(IMAGE, 4), 6, 7, *bounded(VIDEO, 4), 11, *bounded(VIDEO, 4), 8], [9, *bounded(IMAGE, 8), 6])


def qwen3(model_type: str, class_name: str, tower: dict, adopted: bool = False, **fields) -> NativeHost:
    text = decoder(f"{model_type}_text", **{"rope_parameters": INTERLEAVED, **fields})
    return NativeHost(
        class_name,
        {"model_type": model_type, "text_config": text, "vision_config": tower, **IDS},
        rows=STAMPED,
        media=(lambda: {**small(), **film()}, wide),
        type_ids="mm_token_type_ids",
        adopted=adopted,
    )


OMNI_TOWER = {
    **TOWER,
    "out_hidden_size": 32,
}
OMNI_EARS = {
    "d_model": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "output_dim": 32,
}


def omni(model_type: str, class_name: str, text: dict, tower: dict, ears: dict, sound: int, **fields) -> NativeHost:
    heard = {"input_features": noise(1, 8, 20, seed=3), "feature_attention_mask": torch.ones(1, 20, dtype=torch.long)}
    return NativeHost(
        class_name,
        {
            "model_type": model_type,
            "text_config": text,
            "vision_config": tower,
            "audio_config": ears,
            **IDS,
            "audio_token_id": AUDIO,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": AUDIO,
            "audio_start_token_id": AUDIO_START,
            "audio_end_token_id": AUDIO_END,
            "position_id_per_seconds": 2,
            "seconds_per_chunk": 2,
            "user_token_id": 110,
        },
        rows=(ONE_SPAN[0], [9, *bounded(IMAGE, 8), 6, AUDIO_START, *[AUDIO] * sound, AUDIO_END, 7]),
        media=(
            lambda: {**small(), **film(), "video_second_per_grid": torch.tensor([1.0])},
            lambda: {**wide(), **heard},
        ),
        **fields,
    )


def glm4v(model_type: str, class_name: str, adopted: bool = False, **fields) -> NativeHost:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return NativeHost(
        class_name,
        {
            "model_type": model_type,
            "text_config": decoder(f"{model_type}_text", rope_parameters=rope, **fields),
            "vision_config": {**TOWER, "out_hidden_size": 32, "image_size": 16},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": IMAGE_START,
            "image_end_token_id": IMAGE_END,
            "video_start_token_id": VIDEO_START,
            "video_end_token_id": VIDEO_END,
        },
        rows=([5, *bounded(IMAGE, 4), 6, 7, 8], [9, *bounded(IMAGE, 8), 6]),
        media=(small, wide),
        type_ids="mm_token_type_ids",
        adopted=adopted,
    )


ERNIE_PATCH = 3 * 4 * 4
ERNIE = NativeHost(
    "Ernie4_5_VLMoeForConditionalGeneration",
    {
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            **decoder("ernie4_5_vl_moe_text", rope_parameters=MROPE),
            "mlp_layer_types": ["dense", "sparse"],
            "moe_intermediate_size": [24, 16],
            "moe_k": 2,
            "num_experts_per_tok": 2,
            "moe_num_experts": 4,
            "num_experts": 4,
            "moe_num_shared_experts": 2,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
            "in_channels": 3,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": IMAGE_START,
        "image_end_token_id": IMAGE_END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
    },
    rows=([5, *bounded(IMAGE, 4), 6, 7, VIDEO_START, *[VIDEO] * 4, VIDEO_END, 8], [9, *bounded(IMAGE, 8), 6]),
    media=(
        lambda: {**grid((1, 4, 4), patch=ERNIE_PATCH), **grid((2, 4, 4), patch=ERNIE_PATCH, name="video", seed=2)},
        lambda: grid((1, 4, 8), patch=ERNIE_PATCH, seed=1),
    ),
    type_ids="mm_token_type_ids",
    boundaries={IMAGE_START: 1, IMAGE_END: 1, VIDEO_START: 2, VIDEO_END: 2},
    adopted=True,
)

HOSTS = {
    "qwen2_vl": NativeHost(
        "Qwen2VLForConditionalGeneration",
        {
            "model_type": "qwen2_vl",
            "text_config": decoder("qwen2_vl_text", rope_parameters=MROPE),
            "vision_config": {
                **{name: value for name, value in TOWER.items() if name != "intermediate_size"},
                "embed_dim": 16,
                "hidden_size": 32,
                "mlp_ratio": 2,
            },
            **IDS,
        },
        rows=ONE_SPAN,
        media=(lambda: {**small(), **film()}, wide),
        type_ids="mm_token_type_ids",
    ),
    "qwen2_5_vl": NativeHost(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "model_type": "qwen2_5_vl",
            "text_config": decoder("qwen2_5_vl_text", rope_parameters=MROPE),
            "vision_config": {**TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
            **IDS,
        },
        rows=ONE_SPAN,
        media=(lambda: {**small(), **film(), "second_per_grid_ts": torch.tensor([1.0])}, wide),
        type_ids="mm_token_type_ids",
    ),
    "qwen3_vl": qwen3("qwen3_vl", "Qwen3VLForConditionalGeneration", DEEPSTACK_TOWER),
    "qwen3_vl_moe": qwen3(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        DEEPSTACK_TOWER,
        adopted=True,
        **EXPERTS,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "qwen3_5": qwen3("qwen3_5", "Qwen3_5ForConditionalGeneration", LEARNED_TOWER, **LINEAR),
    "qwen3_5_moe": qwen3(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        LEARNED_TOWER,
        adopted=True,
        **LINEAR,
        **EXPERTS,
        shared_expert_intermediate_size=24,
    ),
    "qwen2_5_omni_thinker": omni(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        decoder("qwen2_5_omni_text", rope_parameters=MROPE),
        {**OMNI_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
        {**OMNI_EARS, "n_window": 10},
        sound=5,
    ),
    "qwen3_omni_moe_thinker": omni(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        decoder(
            "qwen3_omni_moe_text", rope_parameters=INTERLEAVED, **EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]
        ),
        DEEPSTACK_TOWER,
        {**OMNI_EARS, "n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 8},
        sound=3,
        adopted=True,
    ),
    "glm4v": glm4v("glm4v", "Glm4vForConditionalGeneration"),
    "glm4v_moe": glm4v(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        adopted=True,
        n_routed_experts=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        mlp_layer_types=["dense", "sparse"],
    ),
    "ernie4_5_vl_moe": ERNIE,
}
