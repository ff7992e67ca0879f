"""GRIN: the gradient of a gate whose experts are sampled, against the exact one, and Transformers' rule."""

import pytest
import torch
from helpers.router_cases import make_router, make_spec, text_context
from torch.nn import functional as F
from transformers.models.phimoe.modeling_phimoe import sparsemixer


EXPERTS, DRAWS = 4, 50_000


def estimated_and_exact(seed: int, loss, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean gradient of the logits over many draws of one slot, and that of sum_e p_e L(p_e f_e)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    outputs, target = torch.randn(EXPERTS, 8, generator=generator), torch.randn(8, generator=generator)
    logits = torch.randn(EXPERTS, generator=generator)
    spec = make_spec(hidden_size=1, num_experts=EXPERTS, num_experts_per_tok=1)
    router = make_router("grin", {"jitter_eps": 1e6, **options}, spec).train()
    router.weight.data.copy_(logits[:, None])
    decision = router(torch.ones(DRAWS, 1), text_context(1, DRAWS))
    loss(decision.expert_weight * outputs[decision.expert_index.squeeze(1)], target).mean().backward()
    logits.requires_grad_()
    p = logits.softmax(0)
    (p * loss(p[:, None] * outputs, target)).sum().backward()
    return router.weight.grad.squeeze(1), logits.grad


def linear(output, target):
    return output @ target


def quadratic(output, target):
    return (output - target).square().sum(-1)


def cosines(loss, **options) -> list[float]:
    return [F.cosine_similarity(*estimated_and_exact(seed, loss, **options), dim=0).item() for seed in range(12)]


def test_of_a_linear_loss_it_is_half_of_the_exact_gradient():
    for seed in range(12):
        found, exact = estimated_and_exact(seed, linear)
        assert F.cosine_similarity(found, exact, dim=0) > 0.99
        assert found.norm() / exact.norm() == pytest.approx(0.5, abs=0.03)


def test_of_a_quadratic_loss_it_points_along_and_that_of_the_best_expert_may_not():
    assert min(cosines(quadratic)) > 0.85
    assert min(cosines(quadratic, sample_in_training=False)) < 0


def test_sampling_touches_near_ties_alone():
    torch.manual_seed(0)
    router, logits = make_router("grin", spec=make_spec(num_experts=16)), torch.randn(20_000, 16)
    kept = router.near_best(logits).isfinite().sum(-1).float()
    assert kept.mean() == pytest.approx(1.05, abs=0.02)


@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_at_inference_it_is_the_rule_of_phimoe(eps):
    torch.manual_seed(0)
    router, hidden, context = make_router("grin", {"jitter_eps": eps}), torch.randn(512, 32), text_context(1, 512)
    decision = router(hidden, context)
    weight, index = sparsemixer(decision.router_logits, jitter_eps=eps, training=False)
    assert torch.equal(decision.expert_index, index) and torch.equal(decision.expert_weight, weight)
    assert not torch.equal(router.train()(hidden, context).expert_index, index)


def test_a_quarter_of_the_other_draws_weigh_their_probability_and_the_rest_a_third():
    torch.manual_seed(0)
    router = make_router("grin", {"jitter_eps": 1e6}, make_spec(num_experts_per_tok=1)).train()
    decision = router(torch.randn(1, 32).expand(DRAWS, 32), text_context(1, DRAWS))
    probs = decision.router_probs.gather(1, decision.expert_index)
    share, best = decision.expert_weight / probs, decision.router_probs.max(-1, keepdim=True).values == probs
    torch.testing.assert_close(share[best], torch.ones(int(best.sum())))
    assert torch.isclose(share, torch.ones(())).logical_or(torch.isclose(share, torch.full((), 1 / 3))).all()
    assert share[~best].mean().item() == pytest.approx(0.25 + 0.75 / 3, abs=0.01)
