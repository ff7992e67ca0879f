"""Mixture of tokens: groups across rows, and the sparse model that they become."""

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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**options):
    return make_router("mixture_of_tokens", options, make_spec(num_experts_per_tok=1)).train(), make_experts(
        make_spec()
    )


def run_expert(experts, expert, token):
    gate, up = (token @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T


@pytest.mark.parametrize("temperature", [1.0, 1e-4])
@pytest.mark.parametrize("by_modality", [True, False])
def test_experts_see_the_mixtures_of_groups(temperature, by_modality):
    router, experts = layer(group_size=3, temperature=temperature, group_by_modality=by_modality)
    context, hidden = make_context(rows=5, positions=8), torch.randn(40, HIDDEN)
    context.modality_ids[4] = 0
    expected, logits = torch.zeros(40, HIDDEN), hidden @ router.weight.T
    for position in range(8):
        column = torch.arange(5) * 8 + position
        column = column[context.token_mask[:, position]]
        kinds = context.modality_ids.flatten()[column] * by_modality
        for group in (part for kind in (0, 1) if (kinds == kind).any() for part in column[kinds == kind].split(3)):
            share = (logits[group] / temperature).softmax(0)  # (g, E), of one token alone where tau is small
            for expert in range(EXPERTS):
                output = run_expert(experts, expert, share[:, expert] @ hidden[group])
                expected[group] += share[:, expert, None] * output * len(group) / 3
    assert_near(moe(router, experts, context)(hidden), expected, 1e-4)


@pytest.mark.parametrize("mixing", ["train", "off"])
def test_rows_see_each_other_at_one_position_while_mixing(mixing):
    router, experts = layer(mixing=mixing)
    forward, hidden = moe(router, experts, text_context(4, 6)), torch.randn(4, 6, HIDDEN)
    before = forward(hidden.flatten(0, 1)).view(4, 6, HIDDEN)
    hidden[1, 3] += 1.0
    changed = (forward(hidden.flatten(0, 1)).view(4, 6, HIDDEN) != before).any(-1)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[slice(None) if mixing == "train" else 1, 3] = True
    assert torch.equal(changed, expected)


def test_every_expert_has_a_gradient_from_one_batch():
    router, experts = layer()
    moe(router, experts, text_context(8, 1))(torch.randn(8, HIDDEN)).square().sum().backward()
    assert all(parameter.grad.flatten(1).any(-1).all() for parameter in experts.parameters())
    assert router.weight.grad.any(-1).all()


def test_a_row_alone_trains_the_sparse_model():
    router, hidden = layer()[0], torch.randn(6, HIDDEN)
    alone, sparse = router(hidden, text_context(1, 6)), router.eval()(hidden, text_context(3, 2))
    assert_near(alone.expert_weight, sparse.router_logits.softmax(-1).amax(-1, keepdim=True))
    assert torch.equal(alone.expert_index, sparse.expert_index)


def sparse_loss(final_temperature):
    torch.manual_seed(0)
    router, experts = layer(final_temperature=final_temperature)
    centres, goals = 2 * torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS, HIDDEN, HIDDEN) / 6
    context, parameters = text_context(16, 4), [*router.parameters(), *experts.parameters()]

    def batch():
        kind = torch.randint(0, EXPERTS, (64,))
        tokens = centres[kind] + torch.randn(64, HIDDEN)
        return tokens, torch.einsum("td,tdf->tf", tokens, goals[kind])

    for step in range(20):
        context.progress = step / 20
        fit(moe(router, experts, context), parameters, batch, 20)
    router.eval()
    return fit(moe(router, experts, context), parameters, batch, 20, lr=0.0)


def test_a_falling_temperature_leads_to_a_sparse_model():
    assert sparse_loss(0.02) < 0.5 * sparse_loss(None)  # 0.97 and 3.67
