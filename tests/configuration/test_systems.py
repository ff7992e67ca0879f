"""The records of published systems: read, checked, and what a config takes of them."""

import inspect

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, MoeConfig, MoeLoraConfig, from_system, list_systems
from hf_moe.configuration.layer_maps import layer_values
from hf_moe.configuration.moe_config import objective_entry
from hf_moe.configuration.systems import load_system, merge_fields, read_record
from hf_moe.construction.step_zero import first_conditions
from hf_moe.modeling.mechanisms import get_mechanism


KEYS = [record.key for record in list_systems("model") if record.model.get("layers") != []]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
RECORD = 'title: "A paper"\nmodel: {num_experts: 4}\n'


def tiny_host(**kwargs) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "num_hidden_layers": 3, "vocab_size": 64, **kwargs})


def test_an_unknown_system_is_refused_with_the_nearest_key():
    with pytest.raises(ValueError, match="Unknown system 'moie'. Did you mean 'moiie'"):
        load_system("moie")


def test_a_path_is_no_key():
    with pytest.raises(ValueError, match="Unknown system"):
        load_system("routing/moiie")


def test_an_alias_leads_to_its_record():
    assert load_system("load_balance").key == "switch_transformer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: [", "record systems/routing/x.yaml is not YAML"),
        ("text", "must hold the fields of a record"),
        ("model: {}", "lacks 'title'"),
        ('title: "A paper"', "has no form: give it one of model, adapter"),
        (RECORD + "difers: []", "Unknown field of systems/routing/x.yaml 'difers'. Did you mean 'differs'"),
        (RECORD + "arxiv: 2401.0123", "systems/routing/x.yaml: arxiv=2401.0123 must be str"),
        (RECORD + "check: tests/x.py", r"systems/routing/x.yaml: check='tests/x.py' must be list\[str\]"),
        (RECORD + "key: y", "Unknown field"),
    ],
)
def test_a_malformed_record_names_file_and_field(text, message):
    with pytest.raises(ValueError, match=message):
        read_record("x", "routing", text)


def test_a_record_without_a_form_names_the_door_of_another():
    with pytest.raises(ValueError, match=r"MoeLoraConfig.from_system\('mixlora'\)"):
        HfMoeConfig.from_system("mixlora")
    with pytest.raises(ValueError, match=r"HfMoeConfig.from_system\('moiie'\)"):
        MoeLoraConfig.from_system("moiie")


def test_variants_are_checked_by_name():
    record = read_record("x", "routing", RECORD + "variants: {a: {}, b: {num_experts: 8}}")
    assert [record.fields("model", name)["num_experts"] for name in (None, "a", "b")] == [4, 4, 8]
    with pytest.raises(ValueError, match="Unknown variant of 'x' 'c'"):
        record.fields("model", "c")
    with pytest.raises(ValueError, match="'moiie' has one form alone"):
        HfMoeConfig.from_system("moiie", variant="x")


ROUTER = {"name": "sequence", "modalities": ["text"]}


@pytest.mark.parametrize(
    "preset, given, merged",
    [
        (ROUTER, {"end_token_id": 9}, {**ROUTER, "end_token_id": 9}),
        (ROUTER, {"name": "sequence", "end_token_id": 9}, {**ROUTER, "end_token_id": 9}),
        (ROUTER, {"name": "top_k"}, {"name": "top_k"}),
        (ROUTER, {"default": "top_k"}, {"default": "top_k"}),
        (ROUTER, "sequence", "sequence"),
        ("top_k", {"norm_topk_prob": False}, {"name": "top_k", "norm_topk_prob": False}),
        ({"load_balance": 0.01}, {"router_z": 0.1}, {"load_balance": 0.01, "router_z": 0.1}),
        ({"load_balance": 0.01}, {}, {}),
        ({"v_proj": {"r": 4, "experts": "lora"}}, {"v_proj": {"r": 2}}, {"v_proj": {"r": 2, "experts": "lora"}}),
    ],
)
def test_given_dicts_are_merged_into_those_of_a_record(preset, given, merged):
    assert merge_fields(preset, given) == merged


def test_what_a_form_returns_is_the_callers_own():
    load_system("moiie").fields("model")["router"]["name"] = "top_k"
    assert load_system("moiie").fields("model")["router"]["name"] == "moiie"


@pytest.mark.parametrize("key", KEYS)
def test_options_of_a_record_are_those_of_its_mechanisms(key):
    moe = MoeConfig(**load_system(key).fields("model"))
    objectives = [objective_entry(label, value) for label, value in moe.objectives.items()]
    used = [(kind, value) for kind in ("router", "experts") for value in layer_values(getattr(moe, kind))]
    used += [("objective", {"name": name, **options}) for name, _, options in objectives]
    for kind, value in used:
        cls = get_mechanism(kind, value["name"])
        of_all = {"name", "layer_reduction", "modalities"} if kind == "objective" else {"name"}
        assert set(value) - of_all <= set(inspect.signature(cls).parameters), (kind, value)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("key", KEYS)
def test_a_record_fits_hosts_of_any_depth(key, layers):
    config = HfMoeConfig.from_system(key, text_config=tiny_host(num_hidden_layers=layers))
    assert config.system == key and config.moe_layers()


def test_entries_of_moe_config_override_those_of_the_record():
    given = {"num_experts": 8, "router": {"group_fractions": [0.5, 0.25, 0.25]}}
    config = HfMoeConfig.from_system("moiie", text_config=tiny_host(), moe_config=given)
    assert config.moe_config.num_experts == 8
    assert config.moe_config.router == {"name": "moiie", "group_fractions": [0.5, 0.25, 0.25]}


def test_a_fine_grained_record_keeps_the_parameters_of_its_coarse_form():
    moe = MoeConfig(**load_system("deepseekmoe").model)
    assert (moe.num_experts + moe.num_shared_experts) % moe.granularity == 0
    assert (moe.num_experts_per_tok + moe.num_shared_experts) % moe.granularity == 0


@pytest.mark.parametrize("key", KEYS)
def test_a_record_builds_a_model_that_trains(key):
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    seen = {"vision_config": tower, "image_token_id": 63} if load_system(key).place_fields() else {}
    text = tiny_host(num_hidden_layers=2, num_key_value_heads=1 if key == "moa_attention_heads" else 2)
    config = HfMoeConfig.from_system(key, text_config=text, **seen)
    model = HfMoeForConditionalGeneration(config).train()
    input_ids = torch.arange(24).view(2, 12)
    modality = torch.zeros_like(input_ids)
    modality[:, 2:6] = 1
    images = {}
    if seen:
        input_ids, images = input_ids.masked_fill(modality == 1, 63), {"pixel_values": torch.randn(2, 3, 16, 16)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        inputs = {
            "input_ids": input_ids,
            "mm_token_type_ids": modality,
            "condition_ids": first_conditions(model, 2),
            **images,
        }
        output = model(**inputs, labels=input_ids)
        output.loss.backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            learnt = parameter.grad is not None and parameter.grad.isfinite().all()
            assert learnt or not parameter.requires_grad, name
        optimizer.zero_grad()
    values = output.objective_values or {}
    assert set(values) == set(config.moe_config.objectives or ()) and all(map(torch.isfinite, values.values()))


def test_one_door_leads_to_what_a_system_is():
    llama = {"model_type": "llama", **SIZES, "num_hidden_layers": 2, "vocab_size": 64}
    model = from_system("moiie", host=llama, moe_config={"num_experts": 8})
    assert model.config.system == "moiie" and model.config.moe_config.num_experts == 8
    assert from_system("moiie", text_config=tiny_host()).moe_config.router["name"] == "moiie"
    assert from_system("mixlora", variant="switch", r=2).num_experts_per_tok == 1
    adapted = from_system("smora", host=model, num_experts=4, num_experts_per_tok=2)
    assert adapted.peft_config["default"].system == "smora"
