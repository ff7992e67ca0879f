"""What stays float32 in a model of low precision, and the plans by which Transformers splits a model."""

import re
from pathlib import Path

import pytest
import torch

import hf_moe.modeling.routers as routers
from hf_moe import HfMoeForConditionalGeneration


ROUTERS = sorted(path.stem for path in Path(routers.__file__).parent.glob("[a-z]*.py"))
LOW = [torch.bfloat16, torch.float16]


def router_config(router):
    slots = 1 if router == "switch_transformer" else 2
    return {"router": router, "num_experts": 8, "num_experts_per_tok": slots, "layers": [0, 2]}


def dtypes_of(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
def test_routers_are_float32_built_as_loaded(tiny_config, router, dtype, tmp_path):
    built = HfMoeForConditionalGeneration._from_config(tiny_config(moe_config=router_config(router)), dtype=dtype)
    built.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert dtypes_of(built) == dtypes_of(loaded)
    floats = {name: kind for name, kind in dtypes_of(built).items() if kind.is_floating_point}
    assert {kind for name, kind in floats.items() if ".gate." in name} <= {torch.float32}
    assert {kind for name, kind in floats.items() if ".gate." not in name and "objectives" not in name} == {dtype}


def test_a_model_of_full_precision_has_its_routers_in_it(tiny_config):
    model = HfMoeForConditionalGeneration._from_config(tiny_config(), dtype=torch.float64)
    assert {tensor.dtype for tensor in model.moe_layers()[1].gate.parameters()} == {torch.float64}


@pytest.mark.parametrize("layer", [0, 1, 2, 10, 12])
def test_patterns_name_the_layers_and_the_star(tiny_model, layer):
    model = tiny_model(host_fields={"num_hidden_layers": 13}, moe_config={"layers": [0, 2, 12]})
    pattern = re.compile("|".join(model._keep_in_fp32_modules_strict))
    name = "model.language_model.layers.{}.mlp.gate.weight"
    assert bool(pattern.search(name.format(layer))) == (layer in (0, 2, 12))
    assert pattern.search(name.format("*"))
    assert not pattern.search("model.language_model.layers.2.mlp.gate_proj.weight")


def starred(model):
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}


@pytest.mark.parametrize("host", ["llama", "qwen2", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("layers", ["all", "from_1"])
def test_plans_name_what_the_model_has(tiny_model, host, layers):
    fields = {"gemma3_text": {"head_dim": 8}, "mixtral": {"num_local_experts": 4}}.get(host)
    model = tiny_model(host, fields, tower=False, moe_config={"layers": layers})
    assert set(model.tp_plan) <= starred(model)
    dense = "model.language_model.layers.*.mlp.down_proj"
    if host in ("llama", "qwen2", "gemma3_text"):
        assert (dense in model.tp_plan) == (layers == "from_1")
        assert "model.language_model.layers.*.self_attn.q_proj" in model.tp_plan


def test_the_head_has_its_place_in_every_plan(tiny_model):
    model = tiny_model()
    assert model.fsdp_plan["lm_head"] == "keep_full_weight"
    assert "lm_head" in model.tp_plan and "lm_head" in model.pp_plan
