"""Cartesian product of experts: two mixtures in series, whose pairs are composite experts."""

import pytest
import torch
from helpers.layers import fitted, make_layer, run
from torch import nn
from torch.nn.functional import mse_loss


def cartesian(**options):
    return make_layer(block={"name": "cartesian_moe", **options}, num_shared_experts=1)


def silenced(layer, side):
    """Let the experts and the shared branch of a side return zero."""
    torch.nn.init.zeros_(layer.experts_of(side).down_proj)
    torch.nn.init.zeros_([layer.shared_expert, layer.second_shared_expert][side].down_proj.weight)
    return layer


@pytest.mark.parametrize("norm", [True, False])
def test_both_sides_follow_the_formula(norm):
    layer, hidden = cartesian(inner_norm=norm), torch.randn(1, 6, 16)
    output, context = run(layer, hidden)
    assert list(context.decisions) == [1, "1.second"]
    x, (one, two) = hidden[0], context.decisions.values()
    a = layer.experts.first(x, one) + layer.shared_expert(x)
    m = x + a
    z = m * (m.square().mean(-1, keepdim=True) + 1e-6).rsqrt() if norm else m
    b = layer.experts.second(z, two) + layer.second_shared_expert(z)
    torch.testing.assert_close(output[0], a + b)
    torch.testing.assert_close(two.router_logits, z @ layer.gate[1].weight.T)


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_alone_is_a_plain_layer(side):
    layer, plain = silenced(cartesian(inner_norm=False), 1 - side), make_layer(width=12, num_shared_experts=1)
    plain.gate.load_state_dict(layer.gate[side].state_dict())
    plain.experts.load_state_dict(layer.experts_of(side).state_dict())
    plain.shared_expert.load_state_dict([layer.shared_expert, layer.second_shared_expert][side].state_dict())
    hidden = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(hidden), plain(hidden), atol=1e-6, rtol=0)


def test_it_has_the_parameters_of_a_plain_layer():
    sizes = [sum(p.numel() for p in item.parameters()) for item in (cartesian(), make_layer(num_shared_experts=1))]
    assert sizes[0] - sizes[1] == 16 + 8 * 16  # the norm and the second gate


def test_the_first_gate_learns_through_the_second_side():
    layer, hidden = cartesian(), torch.randn(1, 8, 16)
    layer.experts_of(0).requires_grad_(False)
    run(layer, hidden)[0].square().sum().backward()
    whole = layer.gate[0].weight.grad.clone()
    layer.zero_grad()
    run(silenced(layer, 1), hidden)[0].square().sum().backward()
    assert (whole - layer.gate[0].weight.grad).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("block", "residual_mix", "message"), [({}, True, "two mixtures"), ({"sub_width_ratio": 0.01}, False, "no width")]
)
def test_what_does_not_fit_two_sides_is_refused(block, residual_mix, message):
    with pytest.raises(ValueError, match=message):
        make_layer(block={"name": "cartesian_moe", **block}, num_shared_experts=1, residual_mix=residual_mix)


def harm_of_the_runner_up(seed: int, **moe) -> float:
    """Return how much the loss grows, relatively, where the first router takes its runner-up, after training."""
    generator = torch.Generator().manual_seed(seed)
    f, g = torch.randn(2, 4, 8, 8, generator=generator) * 0.6

    def batch():
        v = torch.randn(256, 8, generator=generator)
        a, b = torch.randint(4, (2, 256), generator=generator)
        inner = torch.tanh(torch.einsum("tij,tj->ti", g[b], v))
        bits = [torch.nn.functional.one_hot(item, 4).float() for item in (a, b)]
        return torch.cat([v, *bits], -1), torch.tanh(torch.einsum("tij,tj->ti", f[a], inner))

    layer, ends = make_layer(32, 16, slots=2, std=0.1, seed=seed, **moe), (nn.Linear(16, 32), nn.Linear(32, 8))
    fitted(layer, batch, 800, ends=ends)
    inputs, targets = batch()
    with torch.no_grad():
        hidden = ends[0](inputs)
        before = mse_loss(ends[1](hidden + layer(hidden[None])[0]), targets)
        layer.router.register_forward_hook(take_runner_up)
        return (mse_loss(ends[1](hidden + layer(hidden[None])[0]), targets) / before).item() - 1


def take_runner_up(router, arguments, decision):
    """Put the best expert that was left out in the place of the best one."""
    decision.expert_index[:, 0] = decision.router_logits.topk(3).indices[:, 2]


@pytest.mark.slow
def test_a_wrong_choice_harms_less_than_in_one_stage():
    one, two = (
        sum(harm_of_the_runner_up(seed, block=block) for seed in range(3)) / 3 for block in ("moe", "cartesian_moe")
    )
    assert two < 0.8 * one
