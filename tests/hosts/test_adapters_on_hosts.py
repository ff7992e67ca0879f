"""LoRA experts and plain LoRA on hosts: the modality of every token arrives, and towers are left alone."""

import pytest
import torch
from helpers.hosts.catalogue import ALL, HOSTS, MULTIMODAL, fast_and_slow, in_place
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.parts import host_parts, part_of
from hf_moe.training.plain_lora import check_lora_trained, get_lora_model, lora_targets


READER = {"name": "ming_multi_router", "modalities": ["text", "image", "video", "audio"]}
QUERIES = r".*self_attn\.q_proj"
EVERY_LINEAR = r".*(proj|fc\d|qkv|linear_?\d|mlp\.[02])"
HOSTED = [name for name in MULTIMODAL if name in ALL]
# Idefics has no placeholders, so that an adapter has to be told; its tower lies in the decoder, without a connector.
CONNECTED = [name for name in HOSTED if name != "idefics"]
READ = ("qwen2_5_vl", "gemma3", "qwen2_audio", "qwen2_5_omni_thinker")


def adapted_modules(model) -> set[str]:
    layers = set(tuner_layers(model))
    return {key.removeprefix("base_model.model.") for key, module in model.named_modules() if module in layers}


def seen_modalities(model, inputs) -> set[tuple[int, ...]]:
    """Return the modalities of all tokens, as each router of the adapter is told them."""
    told = set()

    def note(module, args):
        told.add(tuple(args[1].modality_ids.flatten().tolist()))

    for layer in tuner_layers(model):
        for router in layer.moe_lora_router.values():
            router.register_forward_pre_hook(note)
    with torch.no_grad():
        model(**inputs)
    return told


@pytest.mark.parametrize("build", ["native", "in_place"])
@pytest.mark.parametrize("name", fast_and_slow(CONNECTED, READ))
def test_adapter_routers_see_the_modality_of_every_token(name, build):
    host = HOSTS[name].build() if build == "native" else in_place(name)
    config = MoeLoraConfig(target_modules=QUERIES, router=READER, model_part="language_model")
    model = get_peft_model(host, config)
    expected = tuple(HOSTS[name].modality_ids().flatten().tolist())
    assert seen_modalities(model, HOSTS[name].inputs()) == {expected}


@pytest.mark.parametrize("name", fast_and_slow(HOSTED))
def test_presets_of_language_models_leave_towers_and_connectors_alone(name):
    host = HOSTS[name].build()
    parts = host_parts(host)
    model = get_peft_model(host, MoeLoraConfig.from_system("octavius", target_modules=EVERY_LINEAR))
    adapted = adapted_modules(model)
    assert adapted and {part_of(key, parts) for key in adapted} <= {"backbone", "experts"}


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "idefics"])
def test_towers_alone_can_be_adapted_wherever_they_lie(name):
    host = HOSTS[name].build()
    parts = host_parts(host)
    options = {"exclude_modules": r".*patch_embed.*", "router": "top_k", "model_part": "towers"}
    config = MoeLoraConfig(target_modules=EVERY_LINEAR, **options)
    model = get_peft_model(host, config)
    assert {parts.holder(key) for key in adapted_modules(model)} == {*parts.towers, *parts.connectors}


@pytest.mark.parametrize("name", fast_and_slow(CONNECTED))
def test_plain_lora_names_the_parts_of_any_host(name):
    model = in_place(name)
    parts = host_parts(model)
    same = {name: name for name in ("experts", "connector", "tower")}
    for part, place in {"attention": "backbone", "router": "routers", **same}.items():
        found = lora_targets(model, [part])
        names = [*found["target_modules"], *found["target_parameters"]]
        assert names and {part_of(key, parts) for key in names} == {place}, part


# The tower of Gemma 3 has a pooling head that nothing reads, as `check_lora_trained` would say.
TRAINED = {"gemma3": ["connector"], "qwen2_5_omni_thinker": ["connector", "tower"]}


@pytest.mark.parametrize("name", TRAINED)
def test_plain_lora_on_a_host_starts_equal_and_trains(name):
    model, inputs = in_place(name), HOSTS[name].inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    lora = get_lora_model(model, ["attention", "experts", "router", *TRAINED[name]], r=2)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_near(lora(**inputs).logits[real], expected[real], 1e-5)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    lora(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert check_lora_trained(lora) > 10


def test_the_vision_tower_of_several_is_that_for_images():
    model = in_place("qwen2_5_omni_thinker")
    seeing = lora_targets(model, ["vision_tower"])["target_modules"]
    assert seeing and all(name.startswith("model.visual.") for name in seeing)
    assert set(seeing) < set(lora_targets(model, ["tower"])["target_modules"])
