"""Hierarchical MoE: groups, experts within them, and gates that look at distances."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import fit, make_router, make_spec, text_context


def hierarchical(experts=8, slots=2, width=6, std=1.0, **options):
    spec = make_spec(hidden_size=width, num_experts=experts, num_experts_per_tok=slots)
    router = make_router("hmoe_hierarchical", options, spec)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return router


def decide(router, hidden):
    return router(hidden, text_context(1, len(hidden)))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["laplace", "softmax"])
@pytest.mark.parametrize("level", [1, 2])
def test_only_softmax_gates_see_where_the_origin_is(gate, level):
    router, hidden, shift = hierarchical(**{f"gate_level{level}": gate}), torch.randn(20, 6), torch.randn(6)
    before = decide(router, hidden).router_probs
    router.group_keys += shift
    router.expert_keys += shift
    moved = (decide(router, hidden + shift).router_probs - before).abs().max()
    assert moved > 1e-2 if gate == "softmax" else moved < 1e-5


@torch.no_grad()
def test_a_weight_is_the_product_of_the_kept_shares_of_both_levels():
    router, hidden = hierarchical(), torch.randn(20, 6)
    p = (router.group_bias - torch.cdist(hidden, router.group_keys)).softmax(-1)  # (T, 4)
    q = (router.expert_bias - torch.cdist(hidden, router.expert_keys)).view(20, 4, 2).softmax(-1)
    decision, (kept, group), (best, expert) = decide(router, hidden), p.topk(2), q.max(-1)
    assert_near(decision.router_probs, (p[..., None] * q).flatten(1), 1e-5)
    assert torch.equal(decision.expert_index, 2 * group + expert.gather(1, group))
    assert_near(decision.expert_weight, kept / kept.sum(-1, keepdim=True) * best.gather(1, group), 1e-5)


@torch.no_grad()
def test_one_group_is_a_flat_router_and_all_experts_sum_to_one():
    hidden, one = torch.randn(20, 6), hierarchical(num_groups=1, top_k_groups=1, gate_level2="softmax")
    flat = make_router("top_k", {}, one.spec)
    flat.weight.copy_(one.expert_keys)
    one.expert_bias.zero_()
    ours, theirs = decide(one, hidden), decide(flat, hidden)
    assert torch.equal(ours.expert_index, theirs.expert_index)
    assert_near((ours.expert_weight, ours.router_probs), (theirs.expert_weight, theirs.router_probs), 1e-6)
    dense = decide(hierarchical(slots=8, top_k_groups=4), hidden)
    assert_near(dense.expert_weight.sum(-1), torch.ones(20), 1e-6)


@pytest.mark.parametrize(("slots", "options"), [(2, {"num_groups": 3}), (3, {}), (4, {"top_k_groups": 1})])
def test_groups_that_do_not_fit_are_refused(slots, options):
    with pytest.raises(ValueError, match="must divide num_experts=8, and num_experts_per_tok=. must be"):
        hierarchical(slots=slots, **options)


def error_of(gate, seed):
    """Return the error of 2 x 3 linear experts on the outputs of 2 x 2 linear experts with the same kind of gates."""
    gates = {"gate_level1": gate, "gate_level2": gate, "num_groups": 2, "top_k_groups": 2}
    torch.manual_seed(seed)
    teacher, student = hierarchical(4, 4, 4, 2.0, **gates), hierarchical(6, 6, 4, 0.5, **gates)
    true, learnt, hidden = torch.randn(4, 4), (0.5 * torch.randn(6, 4)).requires_grad_(), torch.randn(4000, 4)
    with torch.no_grad():
        targets = (decide(teacher, hidden).router_probs * (hidden @ true.T)).sum(-1)

    def predict(inputs):
        return (decide(student, inputs).router_probs * (inputs @ learnt.T)).sum(-1)

    return fit(predict, [*student.parameters(), learnt], lambda: (hidden, targets), 1500)


@pytest.mark.slow
def test_laplace_gates_fit_a_hierarchy_better():
    assert sum(error_of("laplace", seed) < error_of("softmax", seed) for seed in range(5)) >= 4
