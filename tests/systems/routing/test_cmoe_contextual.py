"""Contextual mixture of experts: named experts, which a gate learns to find from what some rows tell."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.router_cases import make_experts, make_router, make_spec
from peft import get_peft_model
from torch.nn import functional as F

from hf_moe import MoeLoraConfig
from hf_moe.data.contexts import span_membership
from hf_moe.modeling.routing_context import RoutingContext


CONTEXTS = {"low": [0], "middle": [1], "high": [2]}
SPEC = make_spec(num_experts=3, num_experts_per_tok=1)


def build(**options):
    torch.manual_seed(0)
    return make_router("cmoe_contextual", {"contexts": CONTEXTS, **options}, SPEC).train()


def context_of(membership):
    rows = torch.zeros(len(membership), 1, dtype=torch.long)
    return RoutingContext(rows, rows == 0, condition_ids={"context": membership})


def found_experts(kappa, coef, steps=200):
    """Return the share of tokens that reach their regime's named expert, of which 30% were named in training."""
    router, experts = build(kappa=kappa), make_experts(SPEC)
    centres, maps = 2 * torch.randn(3, 32), torch.randn(3, 32, 32) / 6
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], lr=1e-2)

    def batch(rows=96):
        regime = torch.arange(rows) % 3
        return regime, centres[regime] + torch.randn(rows, 32)

    for _ in range(steps):
        regime, hidden = batch()
        named = torch.rand(len(regime), 1) < 0.3
        membership = torch.where(named, F.one_hot(regime, 3).float(), 1.0)
        decision = router(hidden, context_of(membership))
        wanted = torch.einsum("td,tde->te", hidden, maps[regime])
        loss = F.mse_loss(experts(hidden, decision), wanted) + coef * decision.signals["context_loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    regime, hidden = batch(900)
    with torch.no_grad():
        chosen = router.eval()(hidden, context_of(torch.ones(900, 3))).expert_index[:, 0]
    return (chosen == regime).float().mean().item()


def test_the_gate_finds_the_named_expert_without_being_told():
    assert found_experts(1.0, 0.1) > 0.9
    assert found_experts(0.0, 0.0) < 0.67


def test_rows_that_tell_nothing_are_routed_by_the_plain_gate():
    router, plain, hidden = build(), make_router("top_k", spec=SPEC).train(), torch.randn(6, 32)
    plain.load_state_dict({"weight": router.weight.detach()})
    context = context_of(torch.ones(6, 3))
    found, expected = router(hidden, context), plain(hidden, context)
    assert torch.equal(found.expert_index, expected.expert_index) and not found.signals["context_loss"].any()
    assert torch.equal(found.expert_weight, expected.expert_weight)
    told = context_of(F.one_hot(torch.arange(6) % 3, 3).float())
    assert torch.equal(build(contexts=None)(hidden, told).router_logits, router(hidden, told).router_logits)
    assert router(hidden, told).expert_index[:, 0].tolist() == [0, 1, 2] * 2
    assert torch.equal(router.eval()(hidden, told).router_logits, found.router_logits), "inference is told nothing"


def test_the_loss_is_the_divergence_from_the_informed_gate():
    router, hidden, membership = build(kappa=2.0), torch.randn(4, 32), torch.rand(4, 3)
    informed = (hidden @ router.weight.T + 2 * membership.log()).softmax(-1)
    plain = (hidden @ router.weight.T).log_softmax(-1)
    found = router(hidden, context_of(membership)).signals["context_loss"]
    torch.testing.assert_close(found, F.kl_div(plain, informed, reduction="none").sum(-1))
    (gradient,) = torch.autograd.grad(found.sum(), router.weight)
    torch.testing.assert_close(gradient, (plain.exp() - informed).T @ hidden)


def test_lora_experts_are_guided_in_training_alone():
    router = {"name": "cmoe_contextual", "contexts": CONTEXTS}
    lora = MoeLoraConfig(target_modules=["q_proj"], num_experts=3, num_experts_per_tok=1, router=router)
    host = HOSTS["llama"]
    model, inputs = get_peft_model(host.build(), lora), host.inputs()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    first, last = (torch.eye(3)[[index] * len(inputs["input_ids"])] for index in (0, 2))
    changes = []
    for mode in (True, False):
        model.train(mode)
        logits = [model(**inputs, condition_ids={"context": told}).logits for told in (first, last)]
        changes.append((logits[0] - logits[1]).abs().max() > 1e-3)
    assert changes == [True, False]


def test_memberships_have_their_two_shapes():
    certain = span_membership([[(1, 3)], []], 5, alpha=0.75)
    assert certain.T.tolist() == [[0.25, 1, 1, 0.25, 0.25], [1] * 5]
    assert span_membership([[(3, 7)]], 10, beta=0.5)[:, 0].tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1, 1, 1, 0.5, 0, 0]
    )
    with pytest.raises(ValueError, match="an expert|experts of its own"):
        build(contexts={"low": [0], "high": [0]})
    with pytest.raises(ValueError, match="has 2 columns, and the router 3 contexts: low, middle, high"):
        build()(torch.randn(4, 32), context_of(torch.ones(4, 2)))
