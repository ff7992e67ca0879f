"""One suite over all objectives: layers, rows, padding and micro-batches count alike in each of them."""

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig
from hf_moe.modeling.auxiliary import AuxiliaryLosses
from hf_moe.modeling.decisions import ExpertAssignment, SlotMixture
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import RoutingContext


ROWS, POSITIONS, EXPERTS, NULLS, LAYERS = 4, 6, 4, 2, (1, 3)
NAMES = [
    name for name in mechanism_names("objective") if get_mechanism("objective", name).__module__.startswith("hf_moe.")
]
OPTIONS = {
    "condition_information": {"condition": "domain", "num_conditions": 3},
    "locality": {"condition": "domain", "num_nodes": 4},
    "global_entropy": {"min_experts": {"text": 4, "image": 4}},
}
# Objectives of other decisions than those of feed-forwards.
PARTS = {"moa_image": "attention"}


def make_objective(name: str):
    specs = [MoELayerSpec(layer, 8, EXPERTS, 1, 16, part=PARTS.get(name, "")) for layer in LAYERS]
    objective = build("objective", get_mechanism("objective", name), OPTIONS.get(name, {}), specs, 0.01)
    objective.initialize(0.02)
    return objective


def make_call(seed: int = 0, other_padding: bool = False) -> tuple[dict, RoutingContext]:
    """Return decisions and the context of two layers; `other_padding` changes what padding holds and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.bool)
    mask[0, :2], mask[2, :1] = False, False
    modality = torch.zeros(ROWS, POSITIONS, dtype=torch.long)
    modality[:3, 3:] = 1
    context = RoutingContext(modality, mask, condition_ids={"domain": torch.tensor([0, 1, 2, 0])})
    padding = ~mask.flatten()
    for layer in LAYERS:
        logits = 2 * torch.randn(ROWS * POSITIONS, EXPERTS + NULLS, generator=generator)
        outputs = torch.randn(ROWS * POSITIONS, 8, generator=generator)
        slots = 1 + torch.rand(ROWS * POSITIONS, generator=generator)
        if other_padding:
            logits[padding], outputs[padding], slots[padding] = -logits[padding], 3.0, 100.0
        index = logits.argmax(-1, keepdim=True).clamp(max=EXPERTS).masked_fill(padding[:, None], EXPERTS)
        probs = logits.softmax(-1)
        probs = probs.where(probs > 0.1, 0.0)  # some candidates are not active
        overlap = torch.rand((), generator=generator).expand(ROWS * POSITIONS)
        context.outputs[layer] = outputs.view(ROWS, POSITIONS, -1)
        context.decisions[layer] = ExpertAssignment(
            index,
            (index < EXPERTS).float(),
            EXPERTS,
            router_logits=logits,
            router_probs=probs / probs.sum(-1, keepdim=True),
            signals={"soft_real_slots": slots, "gate_overlap": overlap},
        )
    return context.decisions, context


def rows_of(decisions: dict, context: RoutingContext, rows: slice) -> tuple[dict, RoutingContext]:
    def cut(tensor):
        return tensor.view(ROWS, POSITIONS, *tensor.shape[1:])[rows].flatten(0, 1)

    part = RoutingContext(
        context.modality_ids[rows],
        context.token_mask[rows],
        condition_ids={name: ids[rows] for name, ids in context.condition_ids.items()},
    )
    for layer, decision in decisions.items():
        part.outputs[layer] = context.outputs[layer][rows]
        part.decisions[layer] = ExpertAssignment(
            cut(decision.expert_index),
            cut(decision.expert_weight),
            EXPERTS,
            router_logits=cut(decision.router_logits),
            router_probs=cut(decision.router_probs),
            signals={name: cut(signal) for name, signal in decision.signals.items()},
        )
    return part.decisions, part


def after_a_step(name: str, *calls):
    objective = make_objective(name)
    for call in calls:
        objective.accumulate(*call)
    objective.end_step()
    return objective


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name in NAMES if get_mechanism("objective", name).values_by_layer])
def test_the_layers_are_joined_as_the_config_says(name, reduction):
    decisions, context = make_call()
    objective = after_a_step(name, (decisions, context))
    objective.layer_reduction = reduction
    first, second = (objective({layer: decisions[layer]}, context) for layer in LAYERS)
    expected = (first + second) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(objective(decisions, context), expected)
    assert first.shape == (ROWS,) and (first != second).all()


def test_one_value_of_all_layers_has_no_sum_of_theirs():
    specs = [MoELayerSpec(layer, 8, EXPERTS, 1, 16, part="attention") for layer in LAYERS]
    moe = {"objectives": {"moa_image": {"coef": 1.0, "layer_reduction": "sum"}}}
    with pytest.raises(ValueError, match="objectives.'moa_image'.: moa_image has one value.*layer_reduction out"):
        AuxiliaryLosses(HfMoeConfig(text_config=LlamaConfig(num_hidden_layers=4), moe_config=moe), specs)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_decide_otherwise_are_left_out_and_no_fitting_one_is_an_error(name):
    decisions, context = make_call()
    objective = after_a_step(name, (decisions, context))
    other = {5: SlotMixture(torch.zeros(ROWS, POSITIONS, 4), torch.zeros(ROWS, POSITIONS, 4), EXPERTS)}
    assert torch.equal(objective({**decisions, **other}, context), objective(decisions, context))
    objective.accumulate({**decisions, **other}, context)
    with pytest.raises(ValueError, match="router"):
        objective(other, context)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_one_population_and_rows_have_their_own_value(name):
    call = make_call()
    parts = [rows_of(*call, rows) for rows in (slice(0, 1), slice(1, 4))]
    whole, split = after_a_step(name, call), after_a_step(name, *parts)
    for buffer, other in zip(whole.buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(other, buffer)
    torch.testing.assert_close(torch.cat([whole(*part) for part in parts]), whole(*call))


@pytest.mark.parametrize("name", NAMES)
def test_a_population_is_of_the_last_step_alone_and_cleared_by_initialize(name):
    first, second = make_call(seed=1), make_call(seed=2)
    objective, fresh = after_a_step(name, first), after_a_step(name, second)
    objective.accumulate(*second)
    assert all(buffer.any() for buffer in objective.buffers())
    objective.end_step()
    objective.end_step()  # a step without tokens leaves it
    for buffer, other in zip(objective.buffers(), fresh.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    objective.accumulate(*second)
    objective.initialize(0.02)
    assert not any(buffer.any() for buffer in objective.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_statistics_carry_no_gradient_and_values_do(name):
    decisions, context = make_call(seed=1)
    learnt = []
    for decision in decisions.values():
        decision.router_logits.requires_grad_()
        decision.router_probs = decision.router_logits.softmax(-1)
        for signal in ("soft_real_slots", "gate_overlap"):
            decision.signals[signal] = decision.signals[signal].clone().requires_grad_()
        decision.expert_weight = (0.5 * decision.expert_weight).requires_grad_()
        learnt += [decision.router_logits, decision.expert_weight, *decision.signals.values()]
    for layer in LAYERS:
        learnt.append(context.outputs[layer].requires_grad_())
    objective = after_a_step(name, (decisions, context))
    assert not any(buffer.requires_grad for buffer in objective.buffers())
    gradients = torch.autograd.grad(objective(decisions, context).sum(), learnt, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    assert len(reached) == len(LAYERS) and all(gradient.isfinite().all() and gradient.any() for gradient in reached)


def test_slot_budget_is_the_linear_form_of_the_squared_distance():
    decisions, context = make_call()
    objective = build(
        "objective",
        get_mechanism("objective", "slot_budget"),
        {"budget": 1.2},
        make_objective("slot_budget").specs,
        0.01,
    )
    mask = context.token_mask
    own = [
        (decisions[layer].signals["soft_real_slots"].view(mask.shape) * mask).sum(-1) / mask.sum(-1)
        for layer in LAYERS
    ]
    # Before a step has ended, every row is its own population.
    expected = sum(2 * (mean / 1.2 - 1) / 1.2 * mean for mean in own) / 2
    torch.testing.assert_close(objective(decisions, context), expected)
    objective.accumulate(decisions, context)
    objective.end_step()
    population = [(mean * mask.sum(-1)).sum() / mask.sum() for mean in own]
    expected = sum(2 * (all_rows / 1.2 - 1) / 1.2 * mean for all_rows, mean in zip(population, own, strict=True)) / 2
    torch.testing.assert_close(objective(decisions, context), expected)
    default = make_objective("slot_budget")
    assert default.budgets == {layer: 0.9 for layer in LAYERS}


@pytest.mark.parametrize("name", ["load_balance", "null_load"])
def test_shares_of_something_else_are_refused(name):
    with pytest.raises(ValueError, match="shares"):
        build("objective", get_mechanism("objective", name), {"shares": "rows"}, make_objective(name).specs, 0.01)
