"""BASE layers: even loads, the best match, and the best expert at inference."""

from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import (
    EXPERTS,
    HIDDEN,
    fit,
    make_context,
    make_experts,
    make_router,
    make_spec,
    moe,
    text_context,
)

from hf_moe.modeling.routers.base_layers import matched


SPEC = {"num_experts_per_tok": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def value(scores, expert):
    return scores.gather(1, expert[:, None]).sum().item()


@pytest.mark.parametrize("clusters", [1, 3, 64])
def test_every_expert_has_equally_many_real_tokens(clusters):
    router, context = make_router("base_layers", spec=make_spec(**SPEC)).train(), make_context(rows=5, positions=10)
    centres = torch.randn(clusters, HIDDEN)
    hidden = centres[torch.randint(0, clusters, (50,))] + 0.01 * torch.randn(50, HIDDEN)
    decision = router(hidden, context)  # 48 of the tokens are real
    expert = decision.expert_index[context.token_mask.flatten(), 0]
    assert expert.bincount(minlength=EXPERTS).tolist() == [6] * EXPERTS
    assert_near(decision.expert_weight, (hidden @ router.weight.T).gather(1, decision.expert_index).sigmoid())


@pytest.mark.parametrize("tokens", [5, 6, 7])
def test_a_small_match_is_the_best_of_all(tokens):
    for _ in range(5):
        scores = torch.randn(tokens, 3)
        slots = torch.arange(3).repeat_interleave(-(-tokens // 3)).tolist()
        best = max(value(scores, torch.tensor(order)) for order in set(permutations(slots, tokens)))
        assert value(scores, matched(scores, 0.001)) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("clusters", [2, 3, 256])
@pytest.mark.parametrize("experts", [4, 8])
def test_a_large_match_is_within_a_percent_of_the_best(clusters, experts):
    optimize = pytest.importorskip("scipy.optimize")
    scores = torch.randn(clusters, experts).repeat(256 // clusters + 1, 1)[:256] + 0.1 * torch.randn(256, experts)
    rows, places = optimize.linear_sum_assignment(np.repeat(scores.numpy(), 256 // experts, 1), maximize=True)
    best = value(scores[rows], torch.tensor(places * experts // 256))
    found = value(scores, matched(scores, 0.001))
    balanced = torch.arange(256) % experts
    others = [value(scores, balanced[torch.randperm(256)]) for _ in range(100)]
    assert max(others) < found and best - found < 0.01 * (best - sum(others) / 100)


def test_scores_that_are_no_numbers_end_in_some_match():
    scores = (
        torch.randn(12, 3).index_fill(1, torch.tensor([1]), float("nan")).index_fill(0, torch.tensor([2]), -torch.inf)
    )
    assert matched(scores, 0.001).bincount().tolist() == [4, 4, 4]


def test_a_trained_model_loses_little_by_the_greedy_choice():
    router, experts = make_router("base_layers", spec=make_spec(**SPEC)), make_experts(make_spec())
    context = text_context(8, 16)
    centres, goals = 2 * torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS, HIDDEN, HIDDEN) / 6

    def batch():
        kind = torch.randint(0, EXPERTS, (128,))
        tokens = centres[kind] + torch.randn(128, HIDDEN)
        return tokens, torch.einsum("td,tdf->tf", tokens, goals[kind])

    parameters, forward = [*router.train().parameters(), *experts.parameters()], moe(router, experts, context)
    start, trained = (fit(forward, parameters, batch, steps) for steps in (20, 150))
    router.eval()
    greedy = fit(forward, parameters, batch, steps=20, lr=0.0)
    assert greedy < 1.1 * trained and trained < 0.4 * start  # 0.91, 0.89 and 3.98
    hidden = batch()[0]
    assert torch.equal(router(hidden, context).expert_index[:, 0], (hidden @ router.weight.T).argmax(-1))


def test_several_experts_for_a_token_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok=2 must be 1"):
        make_router("base_layers")
