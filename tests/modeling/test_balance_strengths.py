"""How strong the balance losses are: as in the papers, per gate and per layer, worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from test_objectives import assign, certain, make_context, make_spec
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.configuration.systems import load_system
from hf_moe.modeling.auxiliary import AuxiliaryLosses
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.routing_context import RoutingContext


LAYERS = 3


def losses(objectives: dict, num_experts: int = 4, layers: int = LAYERS, slots: int = 1) -> AuxiliaryLosses:
    config = SimpleNamespace(moe_config=SimpleNamespace(objectives=objectives))
    return AuxiliaryLosses(config, [make_spec(num_experts, layer, slots) for layer in range(layers)])


def auxiliary(objectives: dict, context: RoutingContext, decision: ExpertAssignment, layers: int = LAYERS) -> float:
    """The auxiliary loss of one row with the same decision in every layer, all of its tokens labels."""
    module = losses(objectives, decision.num_experts, layers, decision.expert_index.shape[1])
    context.decisions = dict.fromkeys(range(layers), decision)
    return module(context, torch.tensor([context.token_mask.numel()])).total().item()


def pictured(collapsed: bool) -> tuple[RoutingContext, ExpertAssignment]:
    """576 image and 40 text tokens, the image gate balanced, and the text gate on one expert or balanced."""
    context = make_context(1, 616, modality=[[1] * 576 + [0] * 40])
    gate = context.modality_ids.flatten()
    index = torch.arange(616) % 4
    if collapsed:
        index[576:] = 0
    logits = torch.where((gate == 0)[:, None] & torch.tensor(collapsed), certain(index), torch.zeros(616, 4))
    return context, assign(index, logits, gate_index=gate)


@pytest.mark.parametrize(("options", "expected"), [({}, 3 * 40 / 616), ({"per_gate": True}, 3.0)])
def test_a_gate_of_few_tokens_weighs_as_its_term_says(options, expected):
    balanced, collapsed = (
        auxiliary({"load_balance": {"coef": 1.0, **options}}, *pictured(state)) for state in (False, True)
    )
    assert balanced == pytest.approx(2.0 if options else 1.0)
    assert collapsed - balanced == pytest.approx(expected)


def test_the_term_per_gate_of_a_row_ignores_other_rows():
    context = make_context(3, 6, modality=[[1, 1, 1, 1, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0]])
    index, gate = torch.randint(0, 4, (18,)), context.modality_ids.flatten()
    decision = assign(index, torch.randn(18, 4), gate_index=gate)
    objective = losses({"load_balance": {"coef": 1.0, "per_gate": True}}, layers=1).by_name["load_balance"]
    together = objective({0: decision}, context)
    for row in range(3):
        part = slice(6 * row, 6 * row + 6)
        alone = assign(index[part], decision.router_logits[part], gate_index=gate[part])
        single = RoutingContext(context.modality_ids[row : row + 1], context.token_mask[row : row + 1])
        torch.testing.assert_close(objective({0: alone}, single)[0], together[row])


@pytest.mark.parametrize("name", ["load_balance", "router_z", "local_entropy", "null_load"])
def test_a_sum_over_layers_is_the_mean_times_the_layers(name):
    context = make_context(1, 4)
    logits = torch.randn(4, 5)
    decision = ExpertAssignment(torch.tensor([[0], [1], [1], [4]]), torch.ones(4, 1), 4, logits, logits.softmax(-1))
    mean, total = (
        auxiliary({name: {"coef": 1.0, "layer_reduction": reduction}}, context, decision)
        for reduction in ("mean", "sum")
    )
    assert total == pytest.approx(LAYERS * mean)
    assert auxiliary({name: 1.0}, context, decision) == pytest.approx(mean), "the default stays the mean"


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match=r"layer_reduction='max' must be one of 'mean', 'sum'"):
        losses({"router_z": {"coef": 1.0, "layer_reduction": "max"}})


def test_shares_of_tokens_are_those_of_transformers():
    context, logits = make_context(1, 9), torch.randn(9, 4)
    index = logits.topk(2).indices
    expected = load_balancing_loss_func((logits,), 4, 2).item()
    decision = assign(index, logits)
    preset = load_system("top_k").model["objectives"]
    assert auxiliary(preset, context, decision, layers=1) == pytest.approx(0.001 * expected)
    assert auxiliary({"load_balance": 0.001}, context, decision, layers=1) == pytest.approx(0.001 * expected / 2)


# What a collapse onto one expert with certainty costs in three layers of four experts, K = 1: E times the coefficient,
# by layer where every layer has a loss of its own.
COLLAPSED = {
    "deepseek_v3": 4 * 1e-4 * LAYERS,
    "deepseekmoe": 4 * 1e-3 * LAYERS,
    "ernie45_vl": 4 * 1e-3,
    "evomoe": 4 * 1e-3 * LAYERS,
    "evomoe_dtr": 4 * 1e-3 * LAYERS,
    "ming_multi_router": 4 * 1e-3,
    "moe_llava": 4 * 1e-2 * LAYERS,
    "moiie": 4 * 1e-3,
    "switch_transformer": 4 * 1e-2 * LAYERS,
    "top_k": 4 * 1e-3,
}


@pytest.mark.parametrize(("key", "expected"), COLLAPSED.items())
def test_a_preset_is_as_strong_as_its_paper(key, expected):
    decision = assign([2] * 8, certain([2] * 8))
    objectives = {"load_balance": load_system(key).model["objectives"]["load_balance"]}
    assert auxiliary(objectives, make_context(1, 8), decision) == pytest.approx(expected)


@pytest.mark.parametrize("key", ["adamoe", "dynamic_moe_top_p"])
def test_a_preset_with_shares_of_tokens_grows_with_the_slots(key):
    objectives = load_system(key).model["objectives"]
    name = "null_load" if key == "adamoe" else "load_balance"
    logits = torch.zeros(8, 5 if key == "adamoe" else 4)
    values = []
    for slots in (1, 2):
        index = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4])[:slots].T
        decision = ExpertAssignment(index, torch.ones(8, slots), 4, logits, logits.softmax(-1))
        values.append(auxiliary({name: objectives[name]}, make_context(1, 8), decision))
    assert values == [pytest.approx(0.01), pytest.approx(0.02)]
