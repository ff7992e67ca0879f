"""Tiny models of many families, built from their configs, each with a batch to call it with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf


IMAGE = 60
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**TEXT, "head_dim": 8}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Host:
    """How to build a model, what to give it, and which of its modules to adapt.

    Attributes:
        build: makes the model.
        inputs: makes the keyword arguments of a forward pass with labels.
        targets: linear layers of its own layers, as a regular expression.
        refuses: of `"sequence"`, `"condition"` and `"objectives"`, those that it cannot have.
        decodes: it generates text.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    targets: str
    refuses: tuple[str, ...] = ()
    decodes: bool = True


def words(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Two left-padded rows."""
    input_ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 16, 16)), generator=torch.Generator().manual_seed(2))


def pictured(patches: int = 4, **vision: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two rows with an image of so many patches each."""
    rows = words(length=9 + patches)
    rows["input_ids"][:, 4 : 4 + patches] = IMAGE
    rows["labels"][:, 4 : 4 + patches] = -100
    return {**rows, **vision}


def seq2seq() -> dict[str, torch.Tensor]:
    return words() | {"labels": torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(3))}


def labelled(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**inputs, "labels": torch.tensor([0, 2])}


def packed_images() -> dict[str, torch.Tensor]:
    rows = pictured(pixel_values=pixels(2 * 16, 3 * 2 * 4 * 4), image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    return {**rows, "mm_token_type_ids": (rows["input_ids"] == IMAGE).int()}


def _gemma3() -> torch.nn.Module:
    text = {**HEADS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE)
    )


def _qwen2_vl() -> torch.nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    text = {**TEXT, "rope_parameters": MROPE}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def _qwen3_vl() -> torch.nn.Module:
    vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision |= {"hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
    text = {**HEADS, "rope_parameters": MROPE}
    return tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def _llava() -> torch.nn.Module:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**VISION), image_token_id=IMAGE
        )
    )


def _idefics3(family: str) -> torch.nn.Module:
    config = getattr(tf, f"{family}Config")(
        text_config=tf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    return getattr(tf, f"{family}ForConditionalGeneration")(config)


def _bart() -> torch.nn.Module:
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    return tf.BartForConditionalGeneration(
        tf.BartConfig(d_model=32, vocab_size=64, max_position_embeddings=32, pad_token_id=0, **sizes)
    )


def _whisper() -> torch.nn.Module:
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=32,
            vocab_size=64,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **sizes,
        )
    )


def _clip() -> torch.nn.Module:
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


ALL = ("sequence", "condition", "objectives")
ATTENTION = r".*(q_proj|v_proj|down_proj)"
LANGUAGE = r".*(language_model|text_model).*(q_proj|v_proj|down_proj)"

HOSTS = {
    "llama": Host(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), words, ATTENTION),
    "qwen3": Host(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**HEADS)), words, ATTENTION),
    "gemma3_text": Host(
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**HEADS, layer_types=["sliding_attention", "full_attention"], sliding_window=4)
        ),
        words,
        ATTENTION,
    ),
    "mixtral": Host(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4)), words, ATTENTION),
    "qwen3_moe": Host(
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        words,
        ATTENTION,
    ),
    "olmoe": Host(
        lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2)), words, ATTENTION
    ),
    "gpt_oss": Host(
        lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2)),
        words,
        ATTENTION,
    ),
    "gpt2": Host(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2
            )
        ),
        words,
        r".*\.(c_attn|c_fc|c_proj)",
    ),
    "bloom": Host(
        lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
        words,
        r".*\.(query_key_value|dense_h_to_4h)",
    ),
    "mamba": Host(
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64, pad_token_id=0)
        ),
        words,
        r".*\.(in_proj|x_proj)",
    ),
    "gemma3": Host(_gemma3, lambda: pictured(pixel_values=pixels()), LANGUAGE),
    "qwen2_vl": Host(_qwen2_vl, packed_images, LANGUAGE),
    "qwen3_vl": Host(_qwen3_vl, packed_images, LANGUAGE),
    "llava": Host(_llava, lambda: pictured(pixel_values=pixels()), LANGUAGE),
    "idefics3": Host(
        lambda: _idefics3("Idefics3"), lambda: pictured(1, pixel_values=pixels(2, 1, 3, 16, 16)), LANGUAGE
    ),
    "smolvlm": Host(lambda: _idefics3("SmolVLM"), lambda: pictured(1, pixel_values=pixels(2, 1, 3, 16, 16)), LANGUAGE),
    "t5": Host(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                vocab_size=64,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        ),
        seq2seq,
        r".*(SelfAttention\.q|SelfAttention\.v|\.wo)",
        ALL,
    ),
    "bart": Host(_bart, seq2seq, r".*(self_attn\.q_proj|self_attn\.v_proj|fc1)", ALL),
    "whisper": Host(
        _whisper,
        lambda: {"input_features": pixels(2, 8, 16), "labels": torch.randint(3, 60, (2, 5))},
        r".*(self_attn\.q_proj|self_attn\.v_proj|fc1)",
        ALL,
    ),
    "bert": Host(
        lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**SIZES, vocab_size=64, max_position_embeddings=32, num_labels=3)
        ),
        lambda: labelled(**{name: value.flip(1) for name, value in words().items() if name != "labels"}),
        r".*layer\.\d+.*(query|value|output\.dense)",
        decodes=False,
    ),
    "vit": Host(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=3)),
        lambda: labelled(pixel_values=pixels()),
        r".*(q_proj|v_proj|fc1)",
        decodes=False,
    ),
    "dinov2": Host(
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION, mlp_ratio=2, num_labels=3)),
        lambda: labelled(pixel_values=pixels()),
        r".*(query|value|q_proj|v_proj|fc1)",
        decodes=False,
    ),
    "siglip": Host(
        lambda: tf.SiglipForImageClassification(
            tf.SiglipConfig(vision_config=VISION, text_config=SIZES, num_labels=3)
        ),
        lambda: labelled(pixel_values=pixels()),
        r".*layers.*(q_proj|v_proj|fc1)",
        decodes=False,
    ),
    "swin": Host(
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
            )
        ),
        lambda: labelled(pixel_values=pixels()),
        r".*\.fc1",
        ("condition", "objectives"),
        decodes=False,
    ),
    "clip": Host(
        _clip,
        lambda: (
            {name: value[:, :9] for name, value in words().items() if name != "labels"}
            | {"pixel_values": pixels(), "return_loss": True}
        ),
        r".*(q_proj|v_proj|fc1)",
        ("condition", "objectives"),
        decodes=False,
    ),
}
