"""Presets of language models stay inside the decoder of a vision-language model, and those of towers outside."""

import pytest
import torch
from helpers.near import assert_near
from peft import get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from hf_moe import MoeLoraConfig
from hf_moe.adapters import routing_inputs
from hf_moe.adapters.layer import tuner_layers


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 2, "patch_size": 8}


def llava():
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_id=60)
    return LlavaForConditionalGeneration(config).eval()


def qwen3_vl():
    vision = {**VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61)
    return Qwen3VLForConditionalGeneration(config).eval()


@pytest.fixture(params=["own", "llava", "qwen3_vl"])
def vlm(request, own_model):
    torch.manual_seed(0)
    return {"own": own_model, "llava": llava, "qwen3_vl": qwen3_vl}[request.param]()


SYSTEMS = [
    ("octavius", None),
    ("mixlora", None),
    ("mov_molora", "mov"),
    ("mov_molora", "molora"),
    ("smora", None),
    ("becotta", None),
    ("intuition_mor1e", None),
    ("perft", "R"),
    ("pill", None),
    ("moe_redundancy_plora", None),
]


def adapted(model):
    """Return the names of what adapters stand on."""
    return [name for name, module in model.named_modules() if hasattr(module, "moe_lora_A")]


# Stacked weights take LoRA experts alone, and experts are not where a decoder has none.
REFUSED = {
    ("own", "mov_molora", "mov"): "is a stacked weight, which takes the experts 'lora'",
    ("own", "intuition_mor1e", None): "is a stacked weight, which takes the experts 'lora'",
    ("llava", "moe_redundancy_plora", None): "adapts .*, and the model has nothing of that name",
    ("qwen3_vl", "moe_redundancy_plora", None): "adapts .*, and the model has nothing of that name",
}


@pytest.mark.filterwarnings("ignore:ffn_experts=True", "ignore:target_parameters")
@pytest.mark.parametrize("key, variant", SYSTEMS)
def test_a_preset_of_a_language_model_adapts_the_decoder_alone(request, vlm, key, variant, text):
    refusal = REFUSED.get((request.node.callspec.params["vlm"], key, variant))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            get_peft_model(vlm, MoeLoraConfig.from_system(key, variant=variant))
        assert not adapted(vlm)
        return
    inputs = {name: value for name, value in text.items() if name != "labels"}
    ids = {"domain": torch.tensor([0, 3]), "intuition": torch.full((2, 16), 1 / 16)}
    with torch.no_grad():
        base = vlm(**inputs).logits
        model = get_peft_model(vlm, MoeLoraConfig.from_system(key, variant=variant)).eval()
        with routing_inputs(**ids):
            found = model(**inputs).logits
    assert adapted(model) and all(".language_model." in name for name in adapted(model))
    assert_near(found, base, 1e-5)


def test_octavius_has_one_gate_in_a_vision_language_model_which_the_image_does_not_move(own_model, image_rows):
    model = get_peft_model(own_model(), MoeLoraConfig.from_system("octavius")).eval()
    routers = [router for layer in tuner_layers(model) for router in layer.moe_lora_router.values()]
    assert len(routers) == 1
    gates = []
    routers[0].register_forward_hook(lambda module, args, output: gates.append(output))
    inputs = {name: value for name, value in image_rows.items() if name != "labels"}
    with torch.no_grad():
        model(**inputs)
        model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1.0})
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][:, 3] += 1
        model(**inputs)
    assert torch.equal(gates[0].router_probs, gates[1].router_probs)
    assert not torch.equal(gates[0].router_probs, gates[2].router_probs)


def test_a_preset_of_encoders_adapts_the_tower_alone(vlm):
    model = get_peft_model(vlm, MoeLoraConfig.from_system("soft_moa"))
    assert adapted(model) and not any(".language_model." in name for name in adapted(model))


def test_without_a_part_all_of_the_model_is_adapted_and_one_part_is_adapted_whole(own_model, llama):
    config = {"target_modules": ["q_proj"], "router_input": "target"}
    both = adapted(get_peft_model(own_model(), MoeLoraConfig(**config)))
    assert {name.split(".")[3] for name in both} == {"language_model", "vision_tower"}
    for part in (None, "language_model", "towers"):
        assert len(adapted(get_peft_model(llama(), MoeLoraConfig(**config, model_part=part)))) == 2


def test_pill_takes_the_width_of_a_head_from_its_host_and_keeps_its_routers_where_options_are_given(own_model, text):
    inputs = {name: value for name, value in text.items() if name != "labels"}
    base = own_model()(**inputs).logits
    given = {"target_overrides": {"v_proj": {"experts": {"name": "value_gate", "head_dim": 8}}}}
    for fields in ({}, given):
        model = get_peft_model(own_model(), MoeLoraConfig.from_system("pill", **fields)).eval()
        assert torch.equal(model(**inputs).logits, base)
        gates = [p for name, p in model.named_parameters() if "moe_lora_vector" in name]
        assert [gate.shape for gate in gates] == [(1, 2, 32)] * 2


def test_whole_feed_forward_experts_are_refused_where_no_gated_feed_forward_is_a_target(llama):
    with pytest.raises(ValueError, match="name these in target_modules"):
        get_peft_model(llama(), MoeLoraConfig(target_modules=["q_proj"], ffn_experts=True))
    mixtral = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(mixtral, MoeLoraConfig.from_system("mixlora"))


def test_layers_without_a_gated_feed_forward_are_named_in_a_warning(own_model):
    with pytest.warns(UserWarning, match="1 of 2 adapted layers .* model.language_model.layers.1"):
        get_peft_model(own_model(), MoeLoraConfig.from_system("mixlora"))


def test_an_override_of_what_the_model_does_not_have_is_warned_of(llama):
    overrides = {"qproj": {"r": 2}, "q_proj": {"r": 2}}
    with pytest.warns(RuntimeWarning, match=r"target_overrides keys .* ignored: \['qproj'\]"):
        get_peft_model(llama(), MoeLoraConfig(target_modules=["q_proj"], target_overrides=overrides))
