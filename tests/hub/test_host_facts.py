"""What a card, a push and a page say of a host is what Transformers says of it, for every type that it has."""

from types import SimpleNamespace

import pytest
import transformers
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen2VLConfig
from transformers.models.auto import modeling_auto

from hf_moe import HfMoeConfig
from hf_moe.hub.host_facts import (
    auto_model,
    described_tokens,
    modalities,
    model_tags,
    packages,
    pipeline_tag,
    placeholders,
)


# UDOP is an encoder-decoder, and so no host; its config has no parts.
MULTIMODAL = sorted({*modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()} - {"UdopForConditionalGeneration"})
# Transformers lists these as sequence-to-sequence models.
UNLISTED = ["AudioFlamingo3ForConditionalGeneration", "MusicFlamingoForConditionalGeneration"]
TEXT = ["LlamaForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM", "Llama4ForCausalLM", "Mistral4ForCausalLM"]
MAPPINGS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}


def host(name, **fields):
    return SimpleNamespace(model_type="hf_moe", host_class=name, **fields)


@pytest.mark.parametrize("name", [*MULTIMODAL, *UNLISTED])
def test_every_host_takes_what_its_class_declares(name):
    declared = getattr(transformers, name).input_modalities
    config = host(name)
    assert set(modalities(config)) == {"text", *([declared] if isinstance(declared, str) else declared)}
    # The card's program opens the model with a class that the host itself has.
    if len(modalities(config)) > 1 and name not in UNLISTED:
        assert name in MAPPINGS[auto_model(config)].values()


@pytest.mark.parametrize("name", TEXT)
def test_a_decoder_alone_takes_text_whatever_it_inherits(name):
    config = host(name)
    assert modalities(config) == ("text",) and pipeline_tag(config) == "text-generation"
    assert auto_model(config) == "AutoModelForCausalLM" and packages(config) == [] and model_tags(config) == []


@pytest.mark.parametrize(
    ("name", "missing", "taken"),
    [
        ("Gemma4ForConditionalGeneration", {}, ("text", "image", "video", "audio")),
        ("Gemma4ForConditionalGeneration", {"audio_config": None}, ("text", "image", "video")),
        ("Gemma4ForConditionalGeneration", {"audio_config": None, "vision_config": None}, ("text",)),
    ],
)
def test_a_host_without_a_tower_does_not_take_its_modality(name, missing, taken):
    assert modalities(host(name, **missing)) == taken


@pytest.mark.parametrize(
    ("name", "task", "tags", "needed"),
    [
        (
            "Qwen2_5_VLForConditionalGeneration",
            "image-text-to-text",
            ["vision-language", "video"],
            ["pillow", "torchvision", "torchcodec"],
        ),
        ("Gemma3ForConditionalGeneration", "image-text-to-text", ["vision-language"], ["pillow", "torchvision"]),
        ("Qwen2AudioForConditionalGeneration", "audio-text-to-text", ["audio"], ["torchcodec"]),
        (
            "Gemma3nForConditionalGeneration",
            "any-to-any",
            ["vision-language", "audio"],
            ["pillow", "torchvision", "torchcodec"],
        ),
        (
            "InstructBlipVideoForConditionalGeneration",
            "video-text-to-text",
            ["vision-language", "video"],
            ["pillow", "torchvision", "torchcodec"],
        ),
    ],
)
def test_task_tags_and_packages_follow_what_is_taken(name, task, tags, needed):
    config = host(name)
    assert (pipeline_tag(config), model_tags(config), packages(config)) == (task, tags, needed)


def test_a_model_put_together_sees_where_it_has_a_tower():
    assert modalities(HfMoeConfig()) == ("text",)
    seeing = SimpleNamespace(model_type="hf_moe", host_class=None, vision_config=object())
    assert modalities(seeing) == ("text", "image") and auto_model(seeing) == "AutoModelForImageTextToText"
    assert packages(seeing) == ["pillow"]


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), ("text",)),
        (Gemma3TextConfig(architectures=["Gemma3ForCausalLM"]), ("text",)),
        (Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]), ("text", "image", "video")),
        (PreTrainedConfig(), ("text",)),
        (PreTrainedConfig(architectures=["OddModel"]), ("text",)),
    ],
    ids=lambda value: "",
)
def test_the_base_of_an_adapter_is_its_own_host(config, taken):
    assert modalities(config) == taken


def test_placeholders_have_either_ending():
    config = SimpleNamespace(image_token_id=5, video_token_index=6, audio_token_id=None)
    assert placeholders(config) == {"image": 5, "video": 6}


def test_tokens_are_described_by_what_they_stand_for():
    assert described_tokens(("text",)) == "every word"
    assert described_tokens(("text", "image")) == "every patch of the picture and every word"
    assert described_tokens(("text", "image", "audio")).startswith("every patch of the picture, every part of the")
