"""Tiny decoders and towers in local folders, saved as the Hub keeps them."""

import pytest
import torch
from helpers.hosts.small import small_host
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessor, LlavaProcessor

from hf_moe.construction.tokenizer import train_word_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXTS = ["what color is the shape ? red", "is there a circle ? yes", "no blue"]


@pytest.fixture(scope="session")
def save_decoder(tmp_path_factory):
    """Return a function that saves a decoder with visible weights and a tokenizer without a chat template."""

    def save(model_type: str = "llama", max_shard_size: str = "5GB", **fields):
        torch.manual_seed(0)
        tokenizer = train_word_tokenizer(TEXTS, image_token="<pad>")
        tokenizer.chat_template = None
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": len(tokenizer), **ids, **fields})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def decoder_folder(save_decoder):
    return save_decoder(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tower")
    config = AutoConfig.for_model(
        "clip_vision_model", **{**SIZES, "num_hidden_layers": 2}, image_size=16, patch_size=8
    )
    AutoModel.from_config(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """A multimodal model as the Hub keeps it: weights, processor with a chat template, generation settings."""
    tokenizer = train_word_tokenizer([*TEXTS, "USER ASSISTANT :"], image_token="<image>")
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
        ),
    )
    host = small_host("llava", image_token_index=processor.image_token_id)
    host.generation_config.max_new_tokens = 7
    folder = tmp_path_factory.mktemp("llava")
    host.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
