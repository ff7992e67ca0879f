"""Malformed configs and adapter folders: every field is checked, and the message names it."""

import dataclasses
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_moe import MoeLoraConfig


VALUES = [
    *(None, True, -1, 0, 1.5, math.nan, math.inf, "x", "", b"x", object(), (1, 2), {1, 2}),
    *([], ["x"], [""], [1], [-1], [None], [True], [math.nan]),
    *({}, {"x": 1}, {"x": None}, {"x": {}}, {1: 2}, {"name": "x"}, {"name": 1}),
]
NAMED = [None, [], ["x"], "x"]
# What of them is right, by its representation.
ALLOWED = {
    "task_type": [None],
    "peft_type": [None],
    "auto_mapping": [None, {}, {"x": 1}, {"x": None}, {"x": {}}, {1: 2}, {"name": "x"}, {"name": 1}],
    **{name: [None, "x", ""] for name in ("peft_version", "base_model_name_or_path", "revision")},
    **{name: [True] for name in ("inference_mode", "ffn_experts", "use_rslora")},
    **{name: [True] for name in ("init_lora_weights", "freeze_experts")},
    "lora_alpha": [1.5],
    "shared_r": [0],
    "lora_dropout": [0],
    **{name: NAMED for name in ("target_modules", "exclude_modules")},
    **{name: NAMED[:3] for name in ("target_parameters", "modules_to_save")},
    "layers_pattern": [None, []],
    "layers_to_transform": [None, 0, [1]],
    "frozen_experts": [None, [], [1]],
    "objectives": [{}],
    "target_overrides": [{}, {"x": {}}],
    **{name: [{}, {"x": 1}, {"name": 1}] for name in ("rank_pattern", "alpha_pattern")},
    **{name: [None] for name in ("num_experts_per_tok", "model_part", "expert_names", "system", "hf_moe_version")},
}
FIELDS = [field.name for field in dataclasses.fields(MoeLoraConfig)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_it_cannot_be_by_its_name(name):
    for value in VALUES:
        allowed = repr(value) in map(repr, ALLOWED.get(name, []))
        try:
            MoeLoraConfig(**{"target_modules": ["q_proj"], name: value})
        except ValueError as error:
            assert not allowed, f"{name}={value!r}: {error}"
            assert name.removesuffix("s").replace("task_type", "task type") in str(error), error
        else:
            assert allowed, f"{name}={value!r} was taken"


OPTIONS = {
    "is no regular expression": [
        {"target_modules": "["},
        {"exclude_modules": "("},
        {"rank_pattern": {"[": 4}},
        {"target_overrides": {"(": {"r": 2}}},
        {"layers_to_transform": [0], "layers_pattern": "("},
    ],
    r"(inf|nan\}?) must be (float|dict)": [
        {"lora_alpha": math.inf},
        {"objectives": {"load_balance": math.nan}},
        {"router": {"name": "smora", "bias_update_rate": math.nan}},
        {"target_overrides": {"q": {"lora_alpha": math.nan}}},
    ],
    "must be at least": [
        {"router": {"name": "sequence", "end_token_id": -5}},
        {"router": {"name": "intuition_mor1e", "num_clusters": -1}},
        {"layers_to_transform": -1},
    ],
    "pools nothing": [{"router": {"name": "sequence", "modalities": []}}],
    "has no name": [{"router": {"name": "condition", "condition": ""}}],
    "allowed are 'last', 'first'": [{"router": {"name": "sequence", "end": "middle"}}],
    "with a text": [{"router": {"name": 1}}, {"experts": {"name": None}}, {"target_overrides": {"q": {"router": {}}}}],
    r"objectives\['load_balance'\]\['coef'\]='x' must be float": [{"objectives": {"load_balance": {"coef": "x"}}}],
    "Unknown system 'octavis'": [{"system": "octavis"}],
}


@pytest.mark.parametrize(("message", "fields"), [(text, case) for text, cases in OPTIONS.items() for case in cases])
def test_options_out_of_range_are_refused_in_the_config(message, fields):
    with pytest.raises(ValueError, match=message):
        MoeLoraConfig(**{"target_modules": ["q_proj"], **fields})


@pytest.fixture
def folder(llama, randomise, tmp_path):
    model = get_peft_model(llama(), MoeLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    return tmp_path


CONFIGS = {
    "fewer targets": ({"target_modules": ["q_proj"]}, "no place for, among them .*down_proj"),
    "fewer layers": ({"layers_to_transform": [0]}, r"no place for, among them .*layers\.1\."),
    "other targets": ({"target_modules": ["q_proj", "k_proj"]}, "no place for|lack .*k_proj"),
    "an excluded one": ({"exclude_modules": ["v_proj"]}, "no place for, among them .*v_proj"),
    "a router without parameters": ({"router": {"name": "constant"}}, "no place for, among them .*router"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "lack .*among them .*k_proj"),
    "a router per target": ({"router_input": "target"}, "lack .*among them .*router"),
    "a plain LoRA": ({"shared_r": 4}, "lack .*among them .*shared"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_for_other_tensors_than_the_weights_is_refused(llama, folder, case):
    changes, message = CONFIGS[case]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("change", ["added", "taken"])
def test_weights_of_other_tensors_than_the_config_are_refused(llama, folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if "v_proj.moe_lora_A" in key)
    if change == "added":
        weights[name.replace("v_proj", "k_proj")] = torch.zeros(1)
    else:
        del weights[name]
    save_file(weights, path)
    with pytest.raises(ValueError, match="k_proj.moe_lora_A" if change == "added" else "v_proj.moe_lora_A"):
        PeftModel.from_pretrained(llama(), folder)
