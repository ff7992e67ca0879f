"""The condition-information objective is minus a mutual information, in value and in gradient."""

import pytest
import torch

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.routing_context import RoutingContext


ROWS, POSITIONS, EXPERTS = 6, 5, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    objective = get_mechanism("objective", "condition_information")(
        [MoELayerSpec(0, 8, EXPERTS, 2, 16)], 1.0, condition="domain", num_conditions=4
    )
    objective.initialize(0.02)
    logits = 3 * torch.randn(ROWS * POSITIONS, EXPERTS, generator=generator)
    logits.requires_grad_()
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.bool)
    mask[1, :2] = False
    domain = torch.tensor([0, 1, 2, 0, 1, 2])
    context = RoutingContext(mask.long() * 0, mask, condition_ids={"domain": domain})
    return objective, logits, context


def decide(logits):
    index = logits.topk(2).indices
    weight = torch.ones(index.shape)
    return {0: ExpertAssignment(index, weight, EXPERTS, router_logits=logits, router_probs=logits.softmax(-1))}


def mutual_information(logits, context):
    mask = context.token_mask.flatten()
    domain = context.condition_ids["domain"].repeat_interleave(POSITIONS)[mask]
    joint = torch.zeros(4, EXPERTS).index_add(0, domain, logits.softmax(-1)[mask]) / mask.sum()
    ratio = joint[:3] / (joint[:3].sum(1, keepdim=True) * joint.sum(0, keepdim=True))
    return (joint[:3] * ratio.log()).sum()


def test_at_the_population_the_value_and_its_gradient_are_those_of_the_mutual_information(case):
    objective, logits, context = case
    assert not objective(decide(logits), context).any()
    objective.accumulate(decide(logits), context)
    objective.end_step()
    share = context.token_mask.sum(-1) / context.token_mask.sum()
    value = (share * objective(decide(logits), context)).sum()
    expected = -mutual_information(logits, context)
    torch.testing.assert_close(value, expected)
    (found,) = torch.autograd.grad(value, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_population_is_that_of_all_micro_batches_of_the_last_step(case):
    objective, logits, context = case
    objective.accumulate(decide(logits), context)
    whole = objective.accumulated_0.clone()
    objective.end_step()
    for rows in (slice(0, 2), slice(2, 6)):
        part = RoutingContext(
            context.modality_ids[rows],
            context.token_mask[rows],
            condition_ids={"domain": context.condition_ids["domain"][rows]},
        )
        objective.accumulate(decide(logits.view(ROWS, POSITIONS, -1)[rows].flatten(0, 1)), part)
    torch.testing.assert_close(objective.accumulated_0, whole)
    objective.end_step()
    torch.testing.assert_close(objective.population_0, whole)
    assert not objective.accumulated_0.any() and not objective.population_0[3].any()


def test_rows_without_a_condition_are_an_error(case):
    objective, logits, context = case
    context.condition_ids = {}
    with pytest.raises(ValueError, match="condition_ids"):
        objective(decide(logits), context)
