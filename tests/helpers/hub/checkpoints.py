"""Tiny checkpoints for the tests of the bundle, and the process that opens them without the package."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from helpers.hub.open_checkpoint import REFERENCE, sample_image
from helpers.hub.server import OWNER_TOKEN
from helpers.programs import last_line, start
from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor


TEXT = "<image> what is this"
WORDS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "what", "is", "this", *(f"word{index}" for index in range(24)))


def tiny_config(**moe) -> HfMoeConfig:
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    moe = {"num_experts": 4, "num_experts_per_tok": 2, **moe}
    return HfMoeConfig(text_config=text, vision_config=vision, image_token_id=4, moe_config=moe)


def tiny_model(config: HfMoeConfig) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(config).eval()


def tiny_processor() -> HfMoeProcessor:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return HfMoeProcessor(images, tokenizer, image_seq_length=4)


def record(folder: Path, model, processor: HfMoeProcessor) -> None:
    """Write what the checkpoint in `folder` must answer."""
    inputs = dict(processor(images=[sample_image()], text=[TEXT], return_tensors="pt"))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    torch.save({"inputs": inputs, "logits": logits, "ids": ids, "text": TEXT}, folder / REFERENCE)


def open_without_package(folders: list[Path], modules_cache: Path, python: str = sys.executable) -> dict[str, dict]:
    """Return what a process that cannot import `hf_moe` finds in each folder, by the folder's name."""
    opening = start("hub.open_checkpoint", *folders, python=python, HF_MODULES_CACHE=str(modules_cache))
    return {Path(folder).name: found for folder, found in json.loads(last_line(opening)).items()}


def hub_settings(endpoint: str, home: Path) -> dict[str, str]:
    """Return the environment of a process that works with the Hub at `endpoint` and caches everything in `home`."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": OWNER_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }


def start_with_hub(program: str, argument, endpoint: str, home: Path, **options) -> subprocess.Popen:
    """Start a program with the Hub at `endpoint`, everything cached in `home`."""
    return start(f"hub.{program}", argument, **{**hub_settings(endpoint, home), **options})
