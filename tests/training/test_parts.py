import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.parts import PARTS, host_parts, part_of
from hf_moe.training.parts import Selector, train_only


@pytest.fixture(scope="module")
def config():
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    moe = {"layers": "every_2", "num_experts": 4, "num_shared_experts": 1}
    return HfMoeConfig(text_config=text, vision_config=vision, moe_config=moe, image_token_id=39)


@pytest.fixture(scope="module")
def omni():
    """A model with a tower that sees and one that hears, each with its connector at its end."""
    sizes = {"num_hidden_layers": 1, "vocab_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "output_dim": 32}
    config = Qwen2_5OmniThinkerConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [0]},
        audio_config={**audio, "num_mel_bins": 8, "max_source_positions": 30},
    )
    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(config)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def parts_trained(model) -> set[str]:
    parts = host_parts(model)
    return {part_of(name, parts) for name in trained(model)}


def test_every_part_has_parameters_and_every_parameter_a_part(config):
    model = HfMoeForConditionalGeneration(config)
    parts = host_parts(model)
    assert {part_of(name, parts) for name, _ in model.named_parameters()} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_trains_and_what_no_gradient_reaches_stays_frozen(config, part):
    model = HfMoeForConditionalGeneration(config)
    unreachable = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    counts = train_only(model, [part])
    assert trained(model) and not trained(model) & unreachable
    assert parts_trained(model) == {part} == set(counts)


def test_a_part_trains_after_others_did_and_the_unreachable_never(config):
    model = HfMoeForConditionalGeneration(config)
    unreachable = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    alone = {part: train_only(HfMoeForConditionalGeneration(config), [part]) for part in PARTS}
    assert unreachable
    for parts in (["routers"], ["experts"], ["backbone", "routers"], list(PARTS), ["tower"]):
        assert train_only(model, parts) == {part: alone[part][part] for part in parts}
        assert parts_trained(model) == set(parts) and not trained(model) & unreachable


def test_older_recipes_call_the_tower_vision_tower(config):
    model = HfMoeForConditionalGeneration(config)
    as_today = train_only(model, ["tower"])
    assert train_only(model, ["vision_tower"]) == as_today and as_today


def test_a_part_that_was_frozen_by_hand_trains_again(config):
    model = HfMoeForConditionalGeneration(config)
    model.requires_grad_(False)
    assert set(train_only(model, ["experts"])) == {"experts"}


@pytest.mark.parametrize(
    "selector, places",
    [
        ("tower", {"model.visual", "model.audio_tower"}),
        ("tower/audio", {"model.audio_tower"}),
        ("tower/video", {"model.visual"}),
        ("vision_tower", {"model.visual"}),
        ("connector", {"model.visual.merger", "model.audio_tower.proj"}),
        ("connector/audio", {"model.audio_tower.proj"}),
    ],
)
def test_towers_and_connectors_train_by_modality(omni, selector, places):
    train_only(omni, [selector])
    assert {host_parts(omni).holder(name) for name in trained(omni)} == places


def test_a_pattern_goes_with_a_modality(omni):
    train_only(omni, ["connector/audio/b*"])
    assert trained(omni) == {"model.audio_tower.proj.bias"}


def test_a_modality_that_the_model_has_not_is_refused(config):
    with pytest.raises(ValueError, match=r"tower/audio: .* has a tower for image alone"):
        train_only(HfMoeForConditionalGeneration(config), ["tower/audio"])


@pytest.mark.parametrize("wrong", ["heads", "tower/audio/weight/more", "routers/image", ""])
def test_what_is_no_part_is_refused_with_what_is(wrong):
    with pytest.raises(ValueError, match="tower and connector"):
        Selector.read(wrong)
