"""LocMoE: a gate without parameters, and a loss that keeps tokens on their node."""

import pytest
import torch
from helpers.router_cases import make_losses, make_router, make_spec, text_context, train_on

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.routing_context import RoutingContext


NODES, SPEC = 4, make_spec(num_experts=16, num_experts_per_tok=1)
OPTIONS = {"num_nodes": NODES, "condition": "node"}


def test_the_fixed_gate_is_orthogonal_and_fair():
    torch.manual_seed(0)
    router = make_router("grap", spec=make_spec(num_experts_per_tok=1))
    rows = router(torch.eye(32), text_context(1, 32)).router_logits.T
    gram = rows @ rows.T
    assert torch.equal(gram, gram[0, 0] * torch.eye(8)) and not list(router.parameters())
    hidden = torch.randn(80_000, 32)
    decision = router(hidden, text_context(8, 10_000))
    torch.testing.assert_close(decision.router_logits, hidden @ rows.T)
    share = decision.expert_index.flatten().bincount(minlength=8) / len(hidden)
    assert (share - 0.125).abs().max() < 0.005
    cosine = torch.cosine_similarity(hidden, rows[decision.expert_index[:, 0]], dim=-1)
    torch.testing.assert_close(decision.signals["gate_cosine"], cosine)
    assert torch.equal(decision.expert_weight, decision.router_probs.amax(-1, keepdim=True))


def test_the_gate_has_equal_groups_and_a_capacity_in_training():
    for fields, message in (
        ({"hidden_size": 30}, "must divide the width 30"),
        ({"num_experts_per_tok": 9}, "=9 must"),
    ):
        with pytest.raises(ValueError, match=message):
            make_router("grap", spec=make_spec(**fields))
    router, hidden = (
        make_router("grap", {"capacity_factor": 2.0}, make_spec(num_experts_per_tok=1)),
        torch.zeros(8, 32),
    )
    hidden[:, 0] = 1.0  # all want expert 0
    served = [(router.train(mode)(hidden, text_context(1, 8)).expert_index == 0).sum() for mode in (True, False)]
    assert served == [2, 8]


def nodes_context(tokens: int = 64) -> RoutingContext:
    context = text_context(NODES, tokens)
    context.condition_ids = {"node": torch.arange(NODES)}
    return context


@pytest.mark.parametrize(("local", "expected"), [(0.999, 0.0), (0.25, 4.619), (0.0, 6.907)])
def test_the_loss_is_the_divergence_from_local_routing(local, expected):
    by_node = torch.full((NODES, NODES), (1 - local) / 3).fill_diagonal_(local)
    uneven = torch.tensor([0.7, 0.1, 0.1, 0.1])  # within a node
    probs = (by_node[:, :, None] * uneven).flatten(1).repeat_interleave(64, dim=0)
    context, losses = nodes_context(), make_losses({"locality": {"coef": 1.0, **OPTIONS}}, SPEC)
    context.decisions[1] = ExpertAssignment(probs.argmax(-1, keepdim=True), torch.ones(256, 1), 16, router_probs=probs)
    losses.accumulate(context)
    losses.end_step()
    assert losses(context, torch.full((NODES,), 64)).total().item() == pytest.approx(expected, abs=2e-3)


def share_of_local_tokens(coef: float) -> float:
    """Train a linear gate on clusters, half of a node's tokens being of the node's own four."""
    torch.manual_seed(0)
    centres, context = 3 * torch.nn.functional.normalize(torch.randn(16, 32), dim=-1), nodes_context()
    router = make_router("top_k", spec=SPEC).train()
    node = torch.arange(NODES).repeat_interleave(64)

    def batch():
        own = 4 * node + torch.randint(4, (256,))
        cluster = torch.where(torch.rand(256) < 0.5, own, torch.randint(16, (256,)))
        return context, centres[cluster] + 0.3 * torch.randn(256, 32)

    objectives = {"load_balance": 0.01, "locality": {"coef": coef, **OPTIONS}}
    train_on(make_losses(objectives, SPEC), router, batch, 300)
    return (router(*reversed(batch())).expert_index[:, 0] // 4 == node).float().mean().item()


def test_the_loss_brings_tokens_to_their_node():
    assert share_of_local_tokens(0.1) > share_of_local_tokens(0.0) + 0.15
