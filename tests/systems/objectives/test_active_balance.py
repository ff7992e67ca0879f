"""Active balance: the share of tokens that activate a candidate, null ones included."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import make_router, make_spec, text_context

from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def decision_of(logits):
    """Return the decision for tokens with these logits, of 8 routed, 2 shared and 2 null candidates."""
    router = make_router("unimoe_audio", {"num_null_experts": 2}, make_spec(num_experts=10, hidden_size=12))
    router.weight.data, router.null_weight.data = torch.eye(12)[:10], torch.eye(12)[10:]
    return router(logits, text_context(1, len(logits)))


def balance(decision, context, **options):
    objective = build(
        "objective", get_mechanism("objective", "active_balance"), options, [make_spec(num_experts=10)], 0.1
    )
    objective.initialize(0.0)
    first = objective({1: decision}, context)
    objective.accumulate({1: decision}, context)
    objective.end_step()
    return first, objective


def test_the_balance_counts_active_candidates_with_null_ones():
    logits, context = 2 * torch.randn(2 * 6, 12), text_context(2, 6)
    decision = decision_of(logits)
    probs, active = decision.router_probs.view(2, 6, 12), (decision.router_probs > 0).float().view(2, 6, 12)
    first, objective = balance(decision, context)
    for value, share in (
        (first, active.mean(1)),
        (objective({1: decision}, context), active.mean((0, 1)).expand(2, 12)),
    ):
        share = torch.cat([share[:, :10], share[:, 10:].mean(-1, keepdim=True).expand(2, 2)], 1)
        assert_near(value, 10 * (share[:, None] * probs).sum(-1).mean(-1))
    same = decision_of(20 * torch.eye(12)[:1].repeat(6, 1))
    assert_near(balance(same, text_context(1, 6))[0], torch.tensor([10.0]))


def test_the_coefficient_falls_with_the_progress_of_training():
    decision, values = decision_of(torch.randn(6, 12)), []
    for progress in (0.0, 0.5, 1.0):
        context = text_context(1, 6)
        context.progress = progress
        values.append(balance(decision, context, final_coef=0.02)[0])
    assert_near(torch.cat(values) / values[0], torch.tensor([1.0, 0.6, 0.2]))
