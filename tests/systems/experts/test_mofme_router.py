"""The uncertainty-aware router of MoFME: what varies under dropout weighs less."""

import pytest
import torch
from helpers.router_cases import make_context, make_hidden, make_router, make_spec


@torch.no_grad()
def test_an_expert_of_an_uncertain_logit_weighs_less():
    router = make_router("mofme", {"uncertainty_passes": 4000}, make_spec(num_experts=2))
    router.weight.copy_(torch.full((2, 32), 1 / 32))
    router.weight[1, :16] += 3 / 32
    router.weight[1, 16:] -= 3 / 32  # the same sum, and ten times the squares
    hidden, context = torch.ones(3, 32), make_context(rows=1, positions=3)
    (mean, variance), decision = router.moments(hidden), router(hidden, context)
    torch.testing.assert_close(mean, torch.ones(3, 2))
    torch.testing.assert_close(variance[0], torch.tensor([1.0, 10.0]) / 9 / 32)
    torch.testing.assert_close(decision.weight_table(), torch.tensor([[10.0, 1.0]] * 3) / 11, atol=1e-3, rtol=0)
    for found, exact in zip(router.train().moments(hidden), (mean, variance), strict=True):
        torch.testing.assert_close(found, exact, atol=0.03, rtol=0.2)
        assert not torch.equal(found, exact)


@pytest.mark.parametrize("slots", [1, 3])
def test_without_dropout_it_is_a_softmax_gate(slots):
    router = make_router("mofme", {"router_dropout": 0.0}, make_spec(num_experts_per_tok=slots)).train()
    context = make_context()
    hidden = make_hidden(context)
    table, probs = router(hidden, context).weight_table(), (hidden @ router.weight.T).softmax(-1)
    best = probs.topk(slots)
    expected = torch.zeros_like(probs).scatter(1, best.indices, best.values)
    torch.testing.assert_close(table, expected / (expected.sum(-1, keepdim=True) if slots > 1 else 1.0))
