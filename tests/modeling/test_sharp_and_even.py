"""SpeechMoE's losses: `sparsity_l1` makes single decisions sharp, and `mean_importance` the load even."""

import pytest
import torch
from helpers.layers import make_layer, run
from torch.nn import functional as F

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import RoutingContext


def losses_of(layer, *names):
    return [build("objective", get_mechanism("objective", name), {}, [layer.spec], 1.0) for name in names]


EVEN = torch.full((4, 4), 0.25)


@pytest.mark.parametrize(
    ("probs", "expected"), [(torch.eye(4), (1, 1)), (EVEN, (2, 1)), (torch.eye(4)[[2] * 4], (1, 4))]
)
def test_exact_values_of_both_losses(probs, expected):
    layer, context = make_layer(experts=4), RoutingContext.all_text(torch.zeros(1, 4, 1))
    context.modality_ids = torch.tensor([[0, 0, 1, 1]])  # which does not matter
    sparsity, importance = losses_of(layer, "sparsity_l1", "mean_importance")
    decisions = {1: ExpertAssignment(torch.zeros(4, 1).long(), torch.ones(4, 1), 4, router_probs=probs)}
    importance.accumulate(decisions, context)
    importance.end_step()
    assert (sparsity(decisions, context).item(), importance(decisions, context).item()) == pytest.approx(expected)


def trained(*names, seed=0):
    """Return the mean entropy of the tokens, and the coefficient of variation of the load."""
    layer = make_layer(12, 16, experts=8, slots=1, router={"name": "top_k", "norm_topk_prob": False}, seed=seed)
    losses, centres, maps = losses_of(layer, *names), 2 * torch.randn(12, 12), torch.randn(12, 12, 12) / 12**0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(200):
        cluster = torch.randint(12, (128,))
        inputs = centres[cluster] + 0.5 * torch.randn(128, 12)
        output, context = run(layer, inputs[None])
        loss = F.mse_loss(output[0], torch.einsum("td,tdo->to", inputs, maps[cluster]))
        for objective in losses:
            loss = loss + objective(context.decisions, context).mean()
            objective.accumulate(context.decisions, context)
            objective.end_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decision = context.decisions[layer.spec.site]
    load = decision.slot_counts(torch.zeros(128).long(), 1, torch.ones(128).bool())[0].float()
    entropy = -(decision.router_probs * decision.router_probs.clamp(min=1e-20).log()).sum(-1).mean()
    return entropy.item(), (load.std(correction=0) / load.mean()).item()


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2))])
def test_one_loss_sharpens_the_other_evens_and_both_do_both(seed):
    arms = ((), ("sparsity_l1",), ("mean_importance",), ("sparsity_l1", "mean_importance"))
    (plain, _), (sharp, uneven), (blunt, _), (both, even) = (trained(*names, seed=seed) for names in arms)
    assert sharp < plain / 2 and blunt > plain
    assert both < 0.4 and even < uneven
