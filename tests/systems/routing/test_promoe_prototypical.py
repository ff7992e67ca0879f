"""ProMoE: prototypes attract their tokens, and reserved tokens never see them."""

import pytest
import torch
from helpers.router_cases import (
    HIDDEN,
    make_context,
    make_hidden,
    make_losses,
    make_router,
    make_spec,
    text_context,
    train_on,
)
from torch.nn import functional as F

from hf_moe import RoutingOverrides


SPEC = make_spec(num_experts_per_tok=1)
LOSS = {"signal": {"coef": 1.0, "signal": "prototype_contrast"}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("score", ["identity", "sigmoid", "softmax"])
def test_reserved_tokens_get_their_expert_alone(score):
    context, options = make_context(), {"score": score, "reserved_modalities": ["image"], "reserved_condition": "role"}
    context.condition_ids = {"role": torch.tensor([-1, -1, 0])}
    router, hidden = make_router("promoe_prototypical", options, make_spec()), make_hidden(context).requires_grad_()
    decision = router(hidden, context)
    expected = torch.where(context.modality_ids == 1, 6, -1)
    expected[2] = 7
    reserved = expected.flatten() >= 0
    assert torch.equal(decision.expert_index[reserved, 0], expected.flatten()[reserved])
    assert (decision.expert_index[reserved, 1] == 8).all() and (decision.expert_index[~reserved] < 6).all()
    assert decision.expert_weight[reserved].tolist() == [[1.0, 0.0]] * int(reserved.sum())
    decision.expert_weight.sum().backward()
    assert not hidden.grad[reserved].any() and hidden.grad[~reserved].any(-1).all() and router.prototypes.grad.any()


def test_a_reserved_expert_that_is_switched_off_leaves_none():
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [7]}))
    decision = make_router("promoe_prototypical", {"reserved_modalities": ["image"]})(make_hidden(context), context)
    image = context.modality_ids.flatten() == 1
    assert (decision.expert_index[image] == 8).all() and not decision.expert_weight[image].any()
    assert decision.router_probs.isfinite().all() and (decision.expert_index[~image] < 7).all()


def test_the_weight_is_the_cosine_at_any_length_of_a_token():
    router, context = make_router("promoe_prototypical", spec=SPEC), make_context()
    hidden = make_hidden(context)
    decision = router(hidden, context)
    best = F.cosine_similarity(hidden[:, None], router.prototypes[None], dim=-1).max(-1)
    assert torch.equal(decision.expert_index[:, 0], best.indices)
    torch.testing.assert_close(decision.expert_weight[:, 0], best.values)
    longer = router(hidden * torch.rand(len(hidden), 1) * 50, context)
    assert torch.equal(longer.expert_index, decision.expert_index)
    torch.testing.assert_close(longer.expert_weight, decision.expert_weight)


def after_a_step(router, hidden, context):
    router.accumulate(router(hidden, context), context)
    router.end_step()
    decision = router(hidden, context)
    return decision.expert_index[:, 0], (context.row_mean(decision.signals["prototype_contrast"])).sum() / 3


def test_the_loss_is_that_of_the_means_in_value_and_gradient():
    router, context = make_router("promoe_prototypical", spec=SPEC).train(), make_context()
    context.token_mask[:] = True
    hidden = make_hidden(context).requires_grad_()
    index, found = after_a_step(router, hidden, context)
    used = index.unique()
    means = torch.stack([hidden[index == expert].mean(0) for expert in used])
    cosines = F.cosine_similarity(router.prototypes[used][:, None], means[None], dim=-1)
    expected = F.cross_entropy(cosines / 0.07, torch.arange(len(used)))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(torch.autograd.grad(value, [hidden, router.prototypes]) for value in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert after_a_step(router, hidden[:1].expand(30, -1), context)[1].item() == 0.0, (
        "with one expert there is no other"
    )


def purity(coef: float, seed: int) -> float:
    """Train on four directions, and return the share of tokens whose prototype is mostly chosen by their direction."""
    torch.manual_seed(seed)
    centres, router, context = (
        F.normalize(torch.randn(4, HIDDEN), dim=-1),
        make_router("promoe_prototypical", spec=SPEC).train(),
        text_context(4, 64),
    )

    def batch():
        return context, centres[torch.arange(256) % 4] + 0.15 * torch.randn(256, HIDDEN)

    train_on(make_losses({"signal": {**LOSS["signal"], "coef": coef}}, SPEC), router, batch, 200)
    index = router(*reversed(batch())).expert_index[:, 0]
    table = torch.zeros(8, 4).index_put((index, torch.arange(256) % 4), torch.ones(256), accumulate=True)
    return (table.amax(1).sum() / 256).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_alone_makes_prototypes_pure(seed):
    assert purity(1.0, seed) > 0.95 > purity(0.0, seed)
