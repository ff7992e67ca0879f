"""What stays float32 in a model of low precision, and the plans by which Transformers splits a model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.mechanisms import CASES
from helpers.router_cases import make_experts, make_spec

import hf_moe.modeling.routers as routers
from hf_moe import HfMoeForConditionalGeneration
from hf_moe.modeling.configured_parts import build_block
from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture
from hf_moe.modeling.experts.ffn import FfnExperts


ROUTERS = sorted({path.stem for path in Path(routers.__file__).parent.glob("[a-z]*.py")} - {"soft_moe"})
STACKS = ("gate_up_proj", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias")
ROUTING = re.compile(r"\.gate\.|\.shared_routing\.")
LOW = [torch.bfloat16, torch.float16]


def router_config(router):
    moe = CASES["router"][router].moe
    own = {name: moe[name] for name in ("num_experts_per_tok", "experts") if name in moe}
    experts = {"modality": 2, "intuition_mor1e": 4}.get(router, 8)  # one per modality; a square
    return {"router": router, "num_experts": experts, "layers": [0, 2], **own}


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
    assert {kind for name, kind in floats.items() if ROUTING.search(name)} <= {torch.float32}
    assert {kind for name, kind in floats.items() if not ROUTING.search(name) and "objectives" not in name} == {dtype}


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


BANKS = {"a": {"num_experts": 4, "intermediate_size": 16}, "b": {"num_experts": 2, "intermediate_size": 8}}
# Host, its fields, moe_config, and the names of the experts' modules; gpt2's experts have biases and no gate.
PLANNED = {
    "gated": ("llama", {}, {}, [""]),
    "biases": ("gpt2", {}, {}, [""]),
    "banks": ("llama", {}, {"num_experts": None, "expert_banks": BANKS}, [".a", ".b"]),
    "host with experts": ("mixtral", {"num_local_experts": 4}, {}, [""]),
    "host without": (
        "mixtral",
        {"num_local_experts": 4},
        {"layers": "all", "num_experts": None, "expert_banks": BANKS},
        [".a", ".b"],
    ),
}
# Experts of different make in places of one name, which one rule would have to serve.
MIXED = {
    "banks in some layers": (
        "llama",
        {},
        {"num_experts": {"1": 4, "default": 6}, "expert_banks": {"1": None, "default": BANKS}},
    ),
    "banks beside the host's": ("mixtral", {"num_local_experts": 4}, {"num_experts": None, "expert_banks": BANKS}),
}


@pytest.mark.parametrize("host, fields, moe_config, places", PLANNED.values(), ids=PLANNED)
@pytest.mark.parametrize("kind, style", [("tp_plan", "moe_tp_experts"), ("ep_plan", "ep_dispatch_experts")])
def test_plans_split_every_stack_of_experts(tiny_model, host, fields, moe_config, places, kind, style):
    model = tiny_model(host, fields, tower=False, moe_config={"num_experts": 4, **moe_config})
    plan = {name: value for name, value in getattr(model, kind).items() if ".experts" in name}
    stacks = {name for name in starred(model) if ".experts." in name and name.rpartition(".")[2] in STACKS}
    whole = {name for name in stacks if name.endswith("down_proj_bias")} if kind == "tp_plan" else set()
    modules = {f"{name.partition('.experts')[0]}.experts{place}" for name in stacks for place in places}
    assert plan.keys() == modules | stacks - whole
    assert {plan[name] for name in modules} == {style}


@pytest.mark.parametrize("host, fields, moe_config", MIXED.values(), ids=MIXED)
def test_experts_that_no_rule_fits_stay_whole(tiny_model, host, fields, moe_config):
    model = tiny_model(host, fields, tower=False, moe_config=moe_config)
    for plan in (model.tp_plan, model.ep_plan):
        assert [name for name in plan if ".experts" in name] == []
    assert "model.language_model.layers.*.self_attn.q_proj" in model.tp_plan


def test_the_shared_branch_is_split_by_its_width(tiny_model):
    plan = tiny_model(moe_config={"num_shared_experts": 1, "shared_expert_gate": True}).tp_plan
    shared = {name.partition("shared_expert.")[2]: style for name, style in plan.items() if ".shared_expert" in name}
    assert shared == {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


@pytest.mark.parametrize("backend", ["ragged", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("fields", [{}, {"gated": False, "bias": True}], ids=["gated", "biases"])
def test_experts_take_index_and_weight_as_a_decision(fields, backend):
    spec = make_spec(**fields)
    experts = make_experts(spec)
    experts.config = SimpleNamespace(_experts_implementation=backend)
    hidden = torch.randn(12, spec.hidden_size)
    index = torch.stack([torch.randperm(spec.num_experts + 1)[:2] for _ in range(12)])  # the last is empty
    weight = torch.rand(12, 2).masked_fill(index == spec.num_experts, 0.0)
    decision = ExpertAssignment(index, weight, spec.num_experts)
    assert torch.equal(experts(hidden, index, weight), experts(hidden, decision))


class PartOfExperts(FfnExperts):
    """What a process holds under a plan: half of the width, or half of the experts."""

    def __init__(self, config, spec, by):
        super().__init__(config, spec)
        if by == "width":
            self.down_proj = torch.nn.Parameter(self.down_proj[..., : spec.expert_intermediate_size // 2])
        else:
            self.num_experts //= 2


@pytest.mark.parametrize("by", ["width", "number"])
@pytest.mark.parametrize("mixture", ["slots", "parameters"])
def test_mixtures_of_split_experts_are_refused(tiny_config, by, mixture):
    config = tiny_config(tower=False, moe_config={"layers": "all"})
    layer = build_block(config, config.moe_config, make_spec(layer_idx=0, num_experts=4))
    layer.experts = PartOfExperts(config, layer.spec, by)
    ones = torch.ones(2, 4, 4)
    decision = SlotMixture(ones, ones, 4)
    if mixture == "parameters":
        decision = ParameterMixture(torch.ones(1, 4), torch.zeros(8, dtype=torch.long), 4)
    layer.gate.forward = lambda *inputs: decision
    with pytest.raises(ValueError, match="needs whole experts in every process.*tp_plan"):
        layer(torch.randn(2, 4, layer.spec.hidden_size))
