"""Tiny hosts that put a tower's features in the place of placeholders: the LLaVA family and its kin."""

import torch

from helpers.hosts.native import (
    CLIP,
    IMAGE,
    PIXTRAL,
    PLAIN_TOWER,
    SIGLIP,
    VIDEO,
    NativeHost,
    decoder,
    noise,
)


SMALL_SIGLIP = {**SIGLIP, "image_size": 8}


def rows(tokens: int) -> tuple[list[int], list[int]]:
    return [5, *[IMAGE] * tokens, 6, 7], [9, *[IMAGE] * tokens, 6, 8, 8, 8]


def pictures(*shape: int, **more: torch.Tensor) -> tuple:
    """One picture for each of two rows."""
    return tuple(lambda seed=seed: {"pixel_values": noise(1, *shape, seed=seed), **more} for seed in range(2))


def sized(height: int, width: int) -> dict[str, torch.Tensor]:
    return {"image_sizes": torch.tensor([[height, width]])}


def llava(model_type: str, class_name: str, tokens: int, media: tuple, text: dict, tower: dict, **fields):
    """A host that names its placeholder `image_token_index`."""
    config = {"model_type": model_type, "text_config": text, "vision_config": tower, "image_token_index": IMAGE}
    return NativeHost(class_name, {**config, **fields}, rows=rows(tokens), media=media)


FRAMES = {"pixel_values_videos": noise(1, 2, 3, 8, 8, seed=5)}
LLAVA_NEXT = {
    "text_config": decoder("llama"),
    "vision_config": CLIP,
    "image_token_index": IMAGE,
    "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]],
    "vision_feature_layer": -2,
}
# A square picture in a grid of one column: the whole (4), one patch (4) and a line's end for each of its rows (2).
NEXT_PICTURES = pictures(3, 3, 8, 8, **sized(8, 8))

HOSTS = {
    "llava": llava(
        "llava",
        "LlavaForConditionalGeneration",
        4,
        pictures(3, 8, 8),
        decoder("llama"),
        CLIP,
        vision_feature_layer=-2,
    ),
    "vipllava": llava(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        4,
        pictures(3, 8, 8),
        decoder("llama"),
        CLIP,
        vision_feature_layers=[-2, -1],
    ),
    "video_llava": NativeHost(
        "VideoLlavaForConditionalGeneration",
        {
            "model_type": "video_llava",
            "text_config": decoder("llama"),
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "vision_feature_layer": -2,
        },
        rows=([5, *[VIDEO] * 8 * 5, 6, 7], [9, *[IMAGE] * 4, 6, 8, 8]),
        media=(
            lambda: {"pixel_values_videos": noise(1, 8, 3, 8, 8)},
            lambda: {"pixel_values_images": noise(1, 3, 8, 8, seed=1)},
        ),
    ),
    "llava_next": NativeHost(
        "LlavaNextForConditionalGeneration",
        {"model_type": "llava_next", **LLAVA_NEXT},
        rows=rows(10),
        media=NEXT_PICTURES,
    ),
    "llava_next_video": NativeHost(
        "LlavaNextVideoForConditionalGeneration",
        {"model_type": "llava_next_video", **LLAVA_NEXT, "video_token_index": VIDEO, "spatial_pool_stride": 2},
        rows=([5, *[IMAGE] * 10, 6, 7, *[VIDEO] * 2, 8], rows(10)[1]),
        media=(lambda: {**NEXT_PICTURES[0](), **FRAMES}, NEXT_PICTURES[1]),
    ),
    "llava_onevision": NativeHost(
        "LlavaOnevisionForConditionalGeneration",
        {
            "model_type": "llava_onevision",
            "text_config": decoder("qwen2"),
            "vision_config": SMALL_SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16]],
            "vision_feature_layer": -1,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
        rows=([5, *[IMAGE] * 10, 6, 7, *[VIDEO] * 3, 8], rows(10)[1]),
        media=(
            lambda: {**pictures(2, 3, 8, 8, **sized(8, 8))[0](), **FRAMES},
            pictures(2, 3, 8, 8, **sized(8, 8))[1],
        ),
    ),
    "pixtral": NativeHost(
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "text_config": decoder("mistral"),
            "vision_config": PIXTRAL,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        rows=([5, *[IMAGE] * 16, 6, 7], [9, *[IMAGE] * 8, 6, 8, 8, 8]),
        media=(pictures(3, 16, 16, **sized(16, 16))[0], pictures(3, 16, 16, **sized(16, 8))[1]),
    ),
    "mistral3": llava(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        4,
        pictures(3, 16, 16, **sized(16, 16)),
        decoder("mistral"),
        PIXTRAL,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "aya_vision": llava(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        4,
        pictures(3, 16, 16),
        decoder("cohere2", layer_types=["sliding_attention", "full_attention"], sliding_window=16, logit_scale=0.25),
        SIGLIP,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "internvl": NativeHost(
        "InternVLForConditionalGeneration",
        {
            "model_type": "internvl",
            "text_config": decoder("qwen2"),
            "vision_config": {**PLAIN_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        rows=rows(4),
        media=pictures(3, 16, 16),
    ),
    "lfm2_vl": NativeHost(
        "Lfm2VlForConditionalGeneration",
        {
            "model_type": "lfm2_vl",
            "text_config": decoder(
                "lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
            ),
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **{name: value for name, value in PLAIN_TOWER.items() if name != "image_size"},
                "num_patches": 16,
            },
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "projector_hidden_size": 16,
            "encoder_patch_size": 4,
        },
        rows=rows(4),
        media=pictures(
            16,
            48,
            spatial_shapes=torch.tensor([[4, 4]]),
            pixel_attention_mask=torch.ones(1, 16, dtype=torch.long),
        ),
    ),
    "aria": NativeHost(
        "AriaForConditionalGeneration",
        {
            "model_type": "aria",
            "text_config": {
                **decoder("aria_text"),
                "intermediate_size": 24,
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 2,
            },
            "vision_config": {"model_type": "idefics3_vision", **PLAIN_TOWER},
            "image_token_index": IMAGE,
            "projector_patch_to_query_dict": {16: 4},
            "vision_feature_layer": -1,
        },
        rows=rows(4),
        media=pictures(3, 16, 16),
        adopted=True,
    ),
}
