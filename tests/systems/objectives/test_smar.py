"""SMAR: the routing of text and images comes into a band of distances, from both of its sides."""

import pytest
import torch
from helpers.router_cases import HIDDEN, make_losses, make_router, make_spec, train_on

from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import NUM_MODALITIES, RoutingContext


SPEC = make_spec()
TERM = {"smar": {"coef": 1.0}}


def start(bias: str | None = "logits", separated: float = 0.0):
    torch.manual_seed(0)
    router = make_router("top_k", {"modality_bias": bias}, SPEC).train()
    router.weight.data *= 0.1
    if bias is not None:
        router.modality_bias.data.normal_(std=0.02)
        router.modality_bias.data[0, :4] += separated
        router.modality_bias.data[1, 4:] += separated
    return router


def equal_states():
    """Return rows of text and image tokens with the same hidden states."""
    modality = torch.tensor([[0] * 8 + [1] * 8])
    hidden = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    return RoutingContext(modality, modality >= 0), hidden


def distance(router) -> float:
    context, hidden = equal_states()
    probs, modality = router(hidden, context).router_probs.detach(), context.modality_ids.flatten()
    text, image = (probs[modality == value].mean(0) for value in (0, 1))
    return 0.5 * ((text - image) * (text.log() - image.log())).sum().item()


@pytest.mark.parametrize("separated", [0.0, 9.0])
def test_the_distance_comes_into_the_band_from_both_sides(separated):
    router, losses = start(separated=separated), make_losses(TERM, SPEC)
    assert distance(router) < 0.01 if separated == 0.0 else distance(router) > 8
    train_on(losses, router, equal_states, 400)
    assert 1.5 - 0.02 < distance(router) < 2.0 + 0.02


def test_the_gate_alone_cannot_tell_equal_states_apart():
    router = start(bias=None)
    train_on(make_losses(TERM, SPEC), router, equal_states, 50)
    assert distance(router) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("separated", "inside"), [(1.0, False), (2.2, True), (4.0, False)])
def test_only_outside_of_the_band_there_is_a_gradient(separated, inside):
    probs = separated / 2 * (torch.eye(2)[:, :1] * 2 - 1) * (torch.arange(8) < 4).mul(2).sub(1)  # text and image
    mean = torch.zeros(1, NUM_MODALITIES, 8)
    mean[0, :2] = probs.softmax(-1)
    mean.requires_grad_()
    penalty = build("objective", get_mechanism("objective", "smar"), {}, [SPEC], 1.0).penalty
    value = penalty(mean, torch.tensor([True, True, False, False]))
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    assert (value.item() == 0.0) is inside and bool(gradient.any()) is not inside
    alone = penalty(mean, torch.tensor([True, False, False, False]))
    assert alone.item() == 0.0 and not torch.autograd.grad(alone.sum(), mean)[0].any()
