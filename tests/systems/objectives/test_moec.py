"""MoEC: a loss that makes a cluster one coarse expert, and a dropout that leaves no cluster empty."""

import pytest
import torch
from helpers.router_cases import make_experts, make_router, make_spec, text_context
from torch import nn
from torch.nn import functional as F

from hf_moe.modeling.objectives.load_balance import LoadBalance


EXPERTS = 16
SPEC = make_spec(hidden_size=16, num_experts=EXPERTS, num_experts_per_tok=1)


def test_the_loss_is_least_for_a_uniform_cluster():
    router = make_router("moec", spec=SPEC)  # four clusters of four
    within = torch.zeros(3, EXPERTS)
    within[0, 4:8], within[1, 4:6], within[2, 5] = 0.25, 0.5, 1.0
    uniform, pair, one = router.cluster_loss(within).tolist()
    assert (uniform, pair, one) == pytest.approx((-3, 16 - 3, 48 - 3))
    found = router.cluster_loss(torch.randn(20_000, EXPERTS).mul(3).softmax(-1))
    assert found.min() > uniform and make_router("moec", {"inter_weight": 0.0}, SPEC).cluster_loss(within)[0] == 0


@pytest.mark.parametrize("scope, empties", [("cluster", False), ("global", True)])
def test_dropout_by_cluster_empties_none(scope, empties):
    torch.manual_seed(0)
    router = make_router("moec", {"dropout_scope": scope}, SPEC)
    dropped = torch.stack([router.dropped_experts(torch.device("cpu")) for _ in range(1000)])
    assert (dropped.sum(-1) == 8).all() and dropped.any(0).all()
    assert dropped.view(1000, 4, 4).all(-1).any() == empties


def test_dropped_experts_are_chosen_by_no_token_and_only_in_training():
    torch.manual_seed(0)
    router, hidden, context = make_router("moec", spec=SPEC), torch.randn(512, 16), text_context(1, 512)
    used = router(hidden, context).expert_index.unique()
    assert len(used) == EXPERTS
    decision = router.train()(hidden, context)
    dropped = (decision.router_logits[0] == float("-inf")).nonzero().flatten()
    assert len(dropped) == 8 and not torch.isin(decision.expert_index, dropped).any()
    assert (make_router("moec", {"expert_dropout": 1.0}, SPEC).dropped_experts(hidden.device).sum()) == 12


def generalisation_gap(name: str, seed: int, steps: int) -> float:
    """Return how much the loss on new samples exceeds that on the 64 of each class that were learnt."""
    torch.manual_seed(seed)
    router, experts, head = make_router(name, spec=SPEC).train(), make_experts(SPEC), nn.Linear(16, 8)
    balance = LoadBalance([SPEC], 0.01)
    centres, label, new = torch.randn(8, 16), torch.arange(512) % 8, torch.arange(2048) % 8
    known, unknown = (centres[y] + 1.5 * torch.randn(len(y), 16) for y in (label, new))
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(steps):
        rows, context = torch.randint(512, (64,)), text_context(1, 64)
        decision = context.decisions[1] = router(known[rows], context)
        loss = F.cross_entropy(head(experts(known[rows], decision)), label[rows])
        loss = loss + 0.01 * sum(
            value.mean() for value in (balance(context.decisions, context), *decision.signals.values())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    router.eval()
    losses = []
    for hidden, y in ((known, label), (unknown, new)):
        losses.append(F.cross_entropy(head(experts(hidden, router(hidden, text_context(1, len(y))))), y).item())
    return losses[1] - losses[0]


@pytest.mark.parametrize(
    "seed, steps", [(0, 100), *(pytest.param(seed, 400, marks=pytest.mark.slow) for seed in (0, 1, 2))]
)
def test_it_overfits_less_than_plain_top_1(seed, steps):
    assert generalisation_gap("moec", seed, steps) < 0.7 * generalisation_gap("top_k", seed, steps)
