"""Tiny models to put LoRA experts on."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


IMAGE = 60
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}


@pytest.fixture
def llama():
    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, pad_token_id=0)).eval()

    return build


@pytest.fixture
def own_model():
    """Build one of this library's own models, with a vision tower and a MoE in its second layer."""

    def build() -> HfMoeForConditionalGeneration:
        torch.manual_seed(0)
        config = HfMoeConfig(
            text_config=LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, pad_token_id=0),
            vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
            moe_config={"layers": [1], "num_experts": 4, "objectives": {"router_z": 0.01}},
            image_token_id=IMAGE,
            initializer_range=0.15,
        )
        return HfMoeForConditionalGeneration(config).eval()

    return build


@pytest.fixture
def vit():
    def build() -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)).eval()

    return build


@pytest.fixture
def text():
    """Two left-padded rows with labels."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 60, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, 0)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def image_rows(text):
    """Two rows with one image of four patches each."""
    input_ids = text["input_ids"].clone()
    input_ids[:, 4:8] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {**text, "input_ids": input_ids, "pixel_values": pixels}


@pytest.fixture
def randomise():
    """Draw all adapter parameters, so that every expert differs and does something."""

    @torch.no_grad()
    def draw(model: torch.nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "moe_lora_" in name:
                parameter.normal_(std=0.3, generator=generator)

    return draw
