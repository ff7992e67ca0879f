"""A tiny multimodal MoE, and rows of text and images for it."""

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig

from helpers.image_rows import IMAGE, PAD, collate, labels_of, row
from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


HOST = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture
def tiny_config():
    """Build a config: Llama or another host, CLIP with four patches an image, top-2 of four experts in two layers."""

    def build(host="llama", host_fields=None, tower=True, **fields):
        moe_config = {"layers": "from_1", "num_experts": 4, **fields.pop("moe_config", {})}
        return HfMoeConfig(
            text_config=AutoConfig.for_model(host, **{**HOST, **(host_fields or {})}),
            vision_config=CLIPVisionConfig(**TOWER) if tower else None,
            moe_config=moe_config,
            image_token_id=IMAGE,
            initializer_range=0.15,
            **fields,
        )

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """Build a model of such a config, with a fixed seed, in eval mode."""

    def build(*args, seed=0, **kwargs):
        torch.manual_seed(seed)
        return HfMoeForConditionalGeneration(tiny_config(*args, **kwargs)).eval()

    return build


@pytest.fixture
def rows():
    """Return four rows of different length: one, no, three and two images."""
    return [row(1, 6, 0), row(0, 9, 1), row(3, 4, 2), row(2, 11, 3)]


@pytest.fixture
def batch(rows):
    return collate(rows)


@pytest.fixture
def training_batch(batch):
    return {**batch, "labels": labels_of(batch)}


@pytest.fixture
def text_batch():
    batch = collate([row(0, 6, 4), row(0, 9, 5)])
    return {**batch, "labels": labels_of(batch)}


@pytest.fixture
def make_batch():
    """Return `collate` and friends for tests that build their own rows."""
    return lambda specs, side="left": collate([row(*spec) for spec in specs], side)
