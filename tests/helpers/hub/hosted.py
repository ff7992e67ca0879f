"""Hosts of Transformers as tiny MoE checkpoints, with processors that are as small."""

import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.video_utils import VideoMetadata

from helpers.hosts.catalogue import HOSTS
from helpers.hosts.native import AUDIO, IMAGE, PAD, VIDEO, NativeHost
from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "router": {"name": "moiie"}, "objectives": {"load_balance": 0.01}}
RATE = 16_000


def hosted_model(name: str, **moe) -> HfMoeForConditionalGeneration:
    """A tiny host with MoE layers, fresh in all its weights."""
    host = HOSTS[name]
    fields = {} if host.adopted else MOE
    config = HfMoeConfig.on_host(host.make_config(), host.class_name, moe_config={**fields, **moe})
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(config).eval()


def tokenizer(host: NativeHost) -> PreTrainedTokenizerFast:
    """Words for all ids of a host, with the marks of its processor in their places."""
    size = host.make_config().get_text_config(decoder=True).vocab_size
    marks = {PAD: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
    marks |= {AUDIO: "<|AUDIO|>", 103: "<|vision_start|>", 104: "<|vision_end|>"}
    marks |= {105: "<|audio_bos|>", 106: "<|audio_eos|>", 10: "what", 11: "is", 12: "this"}
    words = {marks.get(index, f"word{index}"): index for index in range(size)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    special = [marks[index] for index in (IMAGE, VIDEO, AUDIO, 103, 104, 105, 106)]
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special,
    )


CHAT = (
    "{{% for message in messages %}}{{% for part in message.content %}}"
    "{{% if part.type == 'text' %}}{{{{ part.text }}}}{places}{{% endif %}} {{% endfor %}}{{% endfor %}}"
)


def processor(name: str):
    """The processor of `qwen2_5_vl` or `qwen2_audio`, for pictures of 16 x 16 pixels and seconds of few frames."""
    words = tokenizer(HOSTS[name])
    if name == "qwen2_audio":
        place = "{% elif part.type == 'audio' %}<|audio_bos|> <|AUDIO|> <|audio_eos|>"
        ears = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=RATE // 60, n_fft=400)
        return Qwen2AudioProcessor(ears, words, chat_template=CHAT.format(places=place))
    place = "{% elif part.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|>"
    place += "{% elif part.type == 'video' %}<|vision_start|> <|video_pad|> <|vision_end|>"
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"size": {"shortest_edge": 16 * 16, "longest_edge": 16 * 16 * 4}}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes, **bounds),
        words,
        Qwen2VLVideoProcessor(**sizes, **bounds),
        chat_template=CHAT.format(places=place),
    )


def save_hosted(name: str, folder: Path, **moe) -> HfMoeForConditionalGeneration:
    """Write a hosted checkpoint with its processor, and return the model."""
    model = hosted_model(name, **moe)
    model.save_pretrained(folder)
    processor(name).save_pretrained(folder)
    return model


def sample_picture() -> Image.Image:
    return Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def sample_film() -> np.ndarray:
    """Four frames (4, 16, 16, 3)."""
    return np.arange(4 * 16 * 16 * 3, dtype=np.uint32).reshape(4, 16, 16, 3).astype(np.uint8)


def write_wave(path: Path | str) -> None:
    """Write a second of a tone."""
    tone = np.sin(np.arange(RATE) / 20)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((tone * 32767).astype(np.int16).tobytes())


def read_wave(path: str, sampling_rate: int = RATE, **options) -> np.ndarray:
    """In place of Transformers' `load_audio`: no decoder is installed where the tests run."""
    with wave.open(str(path)) as file:
        assert file.getframerate() == sampling_rate
        content = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    return (content / 32768).astype(np.float32)


def read_film(self, videos, sample_indices_fn=None):
    """In place of `fetch_videos` of a video processor: every file holds the same four frames."""
    if isinstance(videos, list):
        return list(zip(*[read_film(self, video) for video in videos], strict=True))
    assert Path(videos).is_file()
    return sample_film(), VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=list(range(4)))
