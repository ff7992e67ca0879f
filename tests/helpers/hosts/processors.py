"""Tiny hosts of Transformers with their own processors, made on the spot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm


PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 320
RATE = 16000
TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
}  # fmt: skip
QWEN2_VISION = {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16}
AUDIO = {
    "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "encoder_layers": 2, "num_mel_bins": 8,
    "max_source_positions": 50,
}  # fmt: skip
QWEN_SIZES = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
SIDE = {"height": 16, "width": 16}


class Host(NamedTuple):
    """A host: its processor, the kinds that it takes, and how to make its native model."""

    name: str
    processor: Any
    kinds: tuple[str, ...]
    config: Callable[[], Any]
    model_class: str

    def model(self) -> Any:
        return getattr(transformers, self.model_class)(self.config()).eval()


def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with special tokens, those of the host under names of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token=PAD, eos_token=END)
    made.add_special_tokens({"pad_token": PAD, "additional_special_tokens": [START, END, *tokens.values()]})
    return PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens=tokens
    )


def template(image: str = "", video: str = "", audio: str = "") -> str:
    """Return a chat template that writes these texts for an image, a video and a sound."""
    return (
        "{% for message in messages %}" + START + "{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% elif part.type == 'video' %}" + video + ""
        "{% elif part.type == 'audio' %}" + audio + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        + END + "\n{% endfor %}{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
    )  # fmt: skip


def _ids(made: PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    return {field: made.convert_tokens_to_ids(token) for field, token in names.items()}


def qwen(name: str) -> Host:
    words = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    made = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **words)
    newer = name == "qwen3_vl"
    ids = _ids(
        made, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )  # fmt: skip
    vision = (
        {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]} if newer else QWEN2_VISION
    )
    rope = {**ROPE, "mrope_interleaved": True} if newer else ROPE
    prefix = "Qwen3VL" if newer else "Qwen2_5_VL"
    videos = getattr(transformers, f"{'Qwen3' if newer else 'Qwen2'}VLVideoProcessor")
    processor = getattr(transformers, f"{prefix}Processor")(
        transformers.Qwen2VLImageProcessor(**QWEN_SIZES), made, videos(**QWEN_SIZES),
        chat_template=template(*(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))),
    )  # fmt: skip

    def config():
        return CONFIG_MAPPING[name](
            text_config={"model_type": f"{name}_text", **TEXT, "rope_parameters": rope}, vision_config=vision, **ids
        )

    return Host(name, processor, ("image", "video"), config, f"{prefix}ForConditionalGeneration")


def hears() -> transformers.WhisperFeatureExtractor:
    return transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1)


def qwen2_audio() -> Host:
    made = tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    processor = transformers.Qwen2AudioProcessor(
        hears(), made, chat_template=template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>\n")
    )

    def config():
        return CONFIG_MAPPING["qwen2_audio"](
        text_config={"model_type": "qwen2", **TEXT}, audio_config={"model_type": "qwen2_audio_encoder", **AUDIO},
        **_ids(made, audio_token_index="<|AUDIO|>"),
    )  # fmt: skip

    return Host("qwen2_audio", processor, ("audio",), config, "Qwen2AudioForConditionalGeneration")


def qwen2_5_omni() -> Host:
    words = {f"{kind}_{side}_token": f"<|{kind}_{side}|>" for kind in ("vision", "audio") for side in ("bos", "eos")}
    made = tokenizer(image_token="<|IMAGE|>", video_token="<|VIDEO|>", audio_token="<|AUDIO|>", **words)
    processor = transformers.Qwen2_5OmniProcessor(
        transformers.Qwen2VLImageProcessor(**QWEN_SIZES), transformers.Qwen2VLVideoProcessor(**QWEN_SIZES), hears(),
        made,
        chat_template=template(
            "<|vision_bos|><|IMAGE|><|vision_eos|>", "<|vision_bos|><|VIDEO|><|vision_eos|>",
            "<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )  # fmt: skip
    processor.videos_kwargs = {"size": QWEN_SIZES["size"]}

    def config():
        return CONFIG_MAPPING["qwen2_5_omni_thinker"](
        text_config={"model_type": "qwen2_5_omni_text", **TEXT, "rope_parameters": ROPE}, vision_config=QWEN2_VISION,
        audio_config={**AUDIO, "n_window": 10, "output_dim": 32}, position_id_per_seconds=2, seconds_per_chunk=2,
        **_ids(
            made, image_token_index="<|IMAGE|>", video_token_index="<|VIDEO|>", audio_token_index="<|AUDIO|>",
            image_token_id="<|IMAGE|>", video_token_id="<|VIDEO|>", audio_token_id="<|AUDIO|>",
            vision_start_token_id="<|vision_bos|>", vision_end_token_id="<|vision_eos|>",
            audio_start_token_id="<|audio_bos|>", audio_end_token_id="<|audio_eos|>",
        ),
    )  # fmt: skip

    return Host(
        "qwen2_5_omni", processor, ("image", "video", "audio"), config, "Qwen2_5OmniThinkerForConditionalGeneration"
    )


def gemma3() -> Host:
    made = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SIDE),
        made,
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )
    layers = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 512,
        "query_pre_attn_scalar": 8,
    }

    def config():
        return CONFIG_MAPPING["gemma3"](
        text_config={"model_type": "gemma3_text", **TEXT, **layers}, mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        **_ids(
            made, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )  # fmt: skip

    return Host("gemma3", processor, ("image",), config, "Gemma3ForConditionalGeneration")


def llava() -> Host:
    made = tokenizer(image_token="<image>")
    side = {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=side, crop_size=side), made, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=template("<image>\n"),
    )  # fmt: skip

    def config():
        return CONFIG_MAPPING["llava"](
        text_config={"model_type": "llama", **TEXT}, **_ids(made, image_token_index="<image>"),
        vision_config={
            "model_type": "clip_vision_model", **VISION, "image_size": 8, "patch_size": 4, "projection_dim": 16,
        },
    )  # fmt: skip

    return Host("llava", processor, ("image",), config, "LlavaForConditionalGeneration")


def idefics(name: str) -> Host:
    made = tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>", video_token="<video>",
    )  # fmt: skip
    settings = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    prefix = "SmolVLM" if name == "smolvlm" else "Idefics3"
    parts = [getattr(transformers, f"{prefix}ImageProcessor")(**settings), made]
    if name == "smolvlm":
        processing_smolvlm.num2words = processing_smolvlm.num2words or str  # words for numbers: no dependency of ours
        sampling = {"fps": 1, "max_frames": 64}
        parts.append(
            transformers.SmolVLMVideoProcessor(
                size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, video_sampling=sampling
            )
        )
    processor = getattr(transformers, f"{prefix}Processor")(
        *parts, image_seq_len=4, chat_template=template("<image>", "<video>")
    )

    def config():
        return CONFIG_MAPPING[name](
        text_config={"model_type": "llama", **TEXT}, scale_factor=2, **_ids(made, image_token_id="<image>"),
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
    )  # fmt: skip

    kinds = ("image", "video") if name == "smolvlm" else ("image",)
    return Host(name, processor, kinds, config, f"{prefix}ForConditionalGeneration")


def internvl() -> Host:
    made = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=False), made,
        transformers.InternVLVideoProcessor(size=SIDE), image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )  # fmt: skip

    def config():
        return CONFIG_MAPPING["internvl"](
        text_config={"model_type": "qwen2", **TEXT}, image_seq_length=4, downsample_ratio=0.5,
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        **_ids(made, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip

    return Host("internvl", processor, ("image", "video"), config, "InternVLForConditionalGeneration")


HOSTS: dict[str, Callable[[], Host]] = {
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
    "gemma3": gemma3,
    "llava": llava,
    "idefics3": lambda: idefics("idefics3"),
    "smolvlm": lambda: idefics("smolvlm"),
    "internvl": internvl,
}
