"""Every trained gate and every router that may take its place: the same outputs, or a refusal that names what can."""

import copy
import math
from functools import cache

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.conversion import convert_router
from hf_moe.construction.gate_forms import EXPRESSES, OPTIONS, OWN_RULES
from hf_moe.modeling.bias_balancing import BiasBalancedRouter
from hf_moe.modeling.mechanisms import mechanism_names


TEXT = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
BANKS = {"text": {"num_experts": 5, "intermediate_size": 16}, "vision": {"num_experts": 3, "intermediate_size": 8}}
SHARED = {"num_shared_experts": 1, "shared_expert_gate": True}
GROUPS = {"n_group": 4, "topk_group": 2}
TARGETS = ("top_k", "ming_multi_router", "anyexperts")
ALL = set(TARGETS)
# source -> (its moe_config, whether it has a bias, the routers that compute the same)
SOURCES = {
    "softmax": ({"router": "top_k"}, False, ALL),
    "softmax, shared": ({"router": "top_k", **SHARED}, False, ALL),
    "softmax, plain": ({"router": {"name": "top_k", "norm_topk_prob": False}}, False, ALL - {"ming_multi_router"}),
    "softmax, scaled": ({"router": {"name": "top_k", "routed_scaling_factor": 1.5}}, False, ALL),
    "softmax, capacity": ({"router": {"name": "top_k", "capacity_factor": 1.0}}, False, {"top_k"}),
    "switch": ({"router": "switch_transformer", "num_experts_per_tok": 1}, False, {"top_k"}),
    "deepseekmoe": ({"router": "deepseekmoe"}, False, ALL - {"ming_multi_router"}),
    "sigmoid": ({"router": {"name": "top_k", "score_function": "sigmoid"}}, False, ALL),
    "sigmoid, plain": (
        {"router": {"name": "top_k", "score_function": "sigmoid", "norm_topk_prob": False}},
        False,
        {"top_k", "anyexperts"},
    ),
    "sigmoid, bias": ({"router": "deepseek_v3"}, True, ALL),
    "sigmoid, zero bias": ({"router": "deepseek_v3"}, False, ALL),
    "softmax, bias": (
        {"router": {"name": "deepseek_v3", "score_function": "softmax"}},
        True,
        ALL,
    ),
    "sigmoid, bias, groups, scale, shared": (
        {"router": {"name": "deepseek_v3", **GROUPS, "routed_scaling_factor": 2.5}, **SHARED},
        True,
        ALL,
    ),
    "softmax, groups by the best, plain": (
        {
            "router": {
                "name": "deepseek_v3",
                "score_function": "softmax",
                "norm_topk_prob": False,
                "n_group": 2,
                "topk_group": 1,
                "group_score": "best",
            }
        },
        False,
        {"top_k", "anyexperts"},
    ),
    "banks": ({"router": "ernie45_vl", "expert_banks": BANKS, "num_shared_experts": 1}, True, {"anyexperts"}),
    "banks, half each": ({"router": "ernie45_vl"}, True, {"anyexperts"}),
    "one slot": ({"router": "top_k", "num_experts_per_tok": 1}, False, {"top_k"}),
    "one scaled input": ({"router": "llama4", "num_experts_per_tok": 1}, False, set()),
    "a gate per modality": ({"router": {"name": "ming_multi_router"}}, False, {"ming_multi_router"}),
    "hypernetwork": ({"router": "evomoe_dtr", "num_experts_per_tok": 1}, False, set()),
}


@cache
def source_model(name):
    moe_config, biased, _ = SOURCES[name]
    torch.manual_seed(0)
    sizes = {} if "expert_banks" in moe_config else {"num_experts": 8}
    config = HfMoeConfig(text_config=TEXT, moe_config={"num_experts_per_tok": 2, **sizes, **copy.deepcopy(moe_config)})
    model = HfMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        for layer in model.moe_layers().values():
            if biased:
                assert isinstance(layer.router, BiasBalancedRouter)
                layer.router.e_score_correction_bias.normal_(std=0.3)
    return model


def logits(model):
    ids = torch.arange(2, 50).view(2, 24)
    kinds = (ids % 3 == 0).long()
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=kinds).logits


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_conversion_keeps_the_outputs_or_is_refused(source, target):
    model = copy.deepcopy(source_model(source))
    before, router = logits(model), model.config.moe_config.router
    if target in SOURCES[source][2]:
        # Room for a virtual expert, which must not win.
        convert_router(model, target, seed=3, **({"max_virtual_share": 0.5} if target == "anyexperts" else {}))
        assert (logits(model) - before).abs().max() < 1e-5
        assert {type(layer.router).mechanism_name for layer in model.moe_layers().values()} == {target}
        return
    with pytest.raises(ValueError, match=f"Layer 0: '{target}' cannot start as this"):
        convert_router(model, target)
    assert torch.equal(logits(model), before) and model.config.moe_config.router == router


@pytest.mark.parametrize("source", [name for name, (_, biased, _) in SOURCES.items() if biased])
def test_the_bias_of_the_gate_shows_in_what_is_kept(source):
    model = copy.deepcopy(source_model(source))
    before = logits(model)
    for layer in model.moe_layers().values():
        layer.router.e_score_correction_bias.zero_()
    assert (logits(model) - before).abs().max() > 1e-3


def test_a_refusal_names_the_routers_that_can():
    message = "'ming_multi_router' cannot start as this TopKRouter, which has weights that are not renormalised and"
    with pytest.raises(ValueError, match=message) as raised:
        convert_router(source_model("softmax, groups by the best, plain"), "ming_multi_router")
    assert "Convert to 'top_k' or 'anyexperts', which can." in str(raised.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("one scaled input", "this Llama4Router, whose weight scales what an expert sees. Keep the router"),
        ("a gate per modality", "this MingMultiRouter, which is more than one top-k gate. Keep the router"),
    ],
)
def test_a_gate_that_is_no_top_k_gate_is_refused_with_the_reason(source, reason):
    with pytest.raises(ValueError, match=reason):
        convert_router(source_model(source), "top_k")


@pytest.mark.parametrize("source", ["sigmoid", "banks, half each", "one scaled input"])
def test_rules_of_its_own_do_not_start_from_other_scores(source):
    with pytest.raises(ValueError, match="it takes over the rows of a gate with softmax scores"):
        convert_router(source_model(source), "moiie")


def test_a_capacity_of_training_goes_along():
    model = copy.deepcopy(source_model("switch"))
    convert_router(model, "top_k")
    assert model.moe_layers()[0].router.capacity_factor == 1.25


def test_options_of_the_user_go_first():
    model = copy.deepcopy(source_model("softmax"))
    before = logits(model)
    convert_router(model, "deepseek_v3", routed_scaling_factor=2.0)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("source", [name for name, (_, _, same) in SOURCES.items() if "anyexperts" in same])
def test_a_converted_gate_trains_and_moves_its_slots(source):
    model = copy.deepcopy(source_model(source)).train()
    convert_router(model, "anyexperts")
    ids = torch.arange(2, 50).view(2, 24)
    output = model(input_ids=ids, mm_token_type_ids=(ids % 3 == 0).long(), labels=ids, output_routing=True)
    output.loss.backward()
    for layer in model.moe_layers().values():
        for name, parameter in layer.router.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert layer.router.importance_out.grad.abs().max() > 0
        assert layer.router.weight.grad.abs().max() > 0
        torch.nn.init.normal_(layer.router.importance_out, std=20.0)
    decisions = model(input_ids=ids, output_routing=True).routing.decisions.values()
    assert all(len(decision.signals["slots"].unique()) > 1 for decision in decisions)
    assert all(decision.expert_weight.isfinite().all() for decision in decisions)


@pytest.mark.parametrize("source", ["softmax", "sigmoid, bias", "softmax, bias", "banks"])
def test_virtual_experts_of_a_converted_gate_compete_at_its_margin(source):
    model = copy.deepcopy(source_model(source))
    convert_router(model, "anyexperts", max_virtual_share=0.5)
    shares = []
    for bias in (-0.01, 0.01):
        for layer in model.moe_layers().values():
            torch.nn.init.constant_(layer.router.virtual_bias, bias)
        decisions = model(input_ids=torch.arange(2, 50).view(2, 24), output_routing=True).routing.decisions.values()
        shares.append([decision.signals["virtual_share"].unique().tolist() for decision in decisions])
    # One of two slots: whoever comes last, by a hair.
    assert shares == [[[0.0], [0.0]], [[0.5], [0.5]]]


def test_a_virtual_expert_weighs_what_the_last_slot_did():
    model = copy.deepcopy(source_model("sigmoid, bias"))
    convert_router(model, "anyexperts", max_virtual_share=0.5)
    router = model.moe_layers()[0].router
    torch.nn.init.constant_(router.virtual_bias, 0.01)
    decision = model(input_ids=torch.arange(2, 50).view(2, 24), output_routing=True).routing.decisions[0]
    scores = decision.router_logits.sigmoid()
    first, last = scores.gather(1, (scores + router.e_score_correction_bias).topk(2).indices).unbind(-1)
    expected = first / (first + last * math.exp(0.01))
    torch.testing.assert_close(decision.expert_weight.sum(-1), expected, atol=1e-5, rtol=0)


def test_every_router_of_the_library_is_decided():
    assert set(EXPRESSES) == set(OPTIONS) == ALL
    assert ALL | set(OWN_RULES) <= set(mechanism_names("router"))
