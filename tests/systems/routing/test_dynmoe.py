"""DynMoE: thresholds that decide how many experts a token uses, and training that decides how many there are."""

import pytest
import torch
from helpers.router_cases import make_context, make_experts, make_router, make_spec, text_context
from torch.nn import functional as F

from hf_moe.modeling.objectives.load_balance import LoadBalance


def step(router, hidden, context=None):
    """Let a step of training end after one batch."""
    context = context or text_context(1, len(hidden))
    router.train().accumulate(router(hidden, context), context)
    router.end_step()


def test_weights_sum_to_one_or_in_training_to_zero():
    torch.manual_seed(0)
    router, hidden, context = make_router("dynmoe"), torch.randn(512, 32), text_context(1, 512)
    router.thresholds.data.copy_(torch.linspace(0.1, 0.4, 8))
    served = router(hidden, context)
    torch.testing.assert_close(served.expert_weight.sum(-1), torch.ones(512))
    trained = router.train()(hidden, context)
    number = (trained.expert_index < 8).sum(-1)
    torch.testing.assert_close(trained.expert_weight.sum(-1), (number > 0).float())
    assert {0, 1, 2} <= set(number.tolist())
    best = F.one_hot(served.router_logits.argmax(-1), 8).float()
    assert torch.equal(served.expert_weight[number == 0], best[number == 0])


def test_an_expert_that_nobody_activates_is_switched_off():
    router = make_router("dynmoe", {"adapt_every": 3, "record_steps": 2})
    step(router, torch.randn(64, 32))  # not recorded
    router.thresholds.data[5] += 5
    step(router, torch.randn(64, 32))
    assert router.usage[0].gt(0).tolist() == [expert != 5 for expert in range(8)]
    router.unserved.zero_()
    step(router, router.directions.detach().repeat(4, 1)[torch.arange(32) % 8 != 5])  # every token has an expert
    assert router.active_experts.tolist() == [expert != 5 for expert in range(8)]
    assert (router.train()(torch.randn(64, 32), text_context(1, 64)).router_logits[:, 5] == float("-inf")).all()
    assert not router.usage.any()


def test_unserved_tokens_switch_on_one_expert_that_points_at_them():
    router = make_router("dynmoe", {"init_experts": 4, "adapt_every": 1, "record_steps": 1})
    router.thresholds.data.fill_(0.9)
    known, away, other = router.directions.detach()[:4], *router.directions.detach()[5:7]
    # The first two tokens are padding.
    step(router, torch.cat([50 * other.expand(2, 32), 3 * away.expand(24, 32), known]), make_context())
    assert router.active_experts.tolist() == [True] * 5 + [False] * 3
    assert F.cosine_similarity(router.directions[4], away, dim=0) > 0.99 and router.thresholds[4] == 0
    found = router.train()(away[None], text_context(1, 1))
    assert found.expert_index[0].tolist() == [8] * 4 + [4] + [8] * 3


def test_thresholds_learn_from_the_tokens_that_pass_them_alone():
    router = make_router("dynmoe").train()
    router.thresholds.data[2:4] = 5.0
    router(torch.randn(256, 32), text_context(1, 256)).expert_weight.square().sum().backward()
    assert router.thresholds.grad.ne(0).tolist() == [expert not in (2, 3) for expert in range(8)]


def mean_number(coef: float, seed: int) -> tuple[float, float]:
    """Return the mean number of experts of a token before and after training."""
    torch.manual_seed(seed)
    spec = make_spec(hidden_size=16)
    router, experts = make_router("dynmoe", spec=spec).train(), make_experts(spec)
    target, balance = torch.randn(16, 16) / 4, LoadBalance([spec], 1.0, shares="tokens")
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], lr=1e-2)
    numbers = []
    for _ in range(300):
        hidden, context = torch.randn(64, 16), text_context(1, 64)
        decision = context.decisions[1] = router(hidden, context)
        numbers.append((decision.expert_index < 8).sum(-1).float().mean().item())
        value = sum(signal.mean() for signal in decision.signals.values()) + balance(context.decisions, context)[0]
        (F.mse_loss(experts(hidden, decision), torch.tanh(hidden @ target)) + coef * value).backward()
        optimizer.step()
        optimizer.zero_grad()
    return numbers[0], sum(numbers[-20:]) / 20


@pytest.mark.parametrize("seed", [0, 1])
def test_the_losses_lower_the_number_of_experts(seed):
    (first, with_losses), (_, without) = (mean_number(coef, seed) for coef in (0.1, 0.0))
    assert with_losses < first and with_losses < 0.5 * without
