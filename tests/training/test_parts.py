import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.training.parts import PARTS, part_of, train_only


@pytest.fixture(scope="module")
def config():
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    moe = {"layers": "every_2", "num_experts": 4, "num_shared_experts": 1}
    return HfMoeConfig(text_config=text, vision_config=vision, moe_config=moe, image_token_id=39)


def test_every_part_has_parameters_and_every_parameter_a_part(config):
    names = [name for name, _ in HfMoeForConditionalGeneration(config).named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_trains_and_what_no_gradient_reaches_stays_frozen(config, part):
    model = HfMoeForConditionalGeneration(config)
    unreachable = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    counts = train_only(model, [part])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and not trainable & unreachable
    assert {part_of(name) for name in trainable} == {part} == set(counts)


def test_a_part_trains_after_others_did_and_the_unreachable_never(config):
    model = HfMoeForConditionalGeneration(config)
    unreachable = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    alone = {part: train_only(HfMoeForConditionalGeneration(config), [part]) for part in PARTS}
    assert unreachable
    for parts in (["routers"], ["experts"], ["backbone", "routers"], list(PARTS), ["vision_tower"]):
        assert train_only(model, parts) == {part: alone[part][part] for part in parts}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {part_of(name) for name in trainable} == set(parts) and not trainable & unreachable


def test_a_part_that_was_frozen_by_hand_trains_again(config):
    model = HfMoeForConditionalGeneration(config)
    model.requires_grad_(False)
    assert set(train_only(model, ["experts"])) == {"experts"}


def test_an_unknown_part_is_refused(config):
    with pytest.raises(ValueError, match="heads"):
        train_only(HfMoeForConditionalGeneration(config), ["heads"])
