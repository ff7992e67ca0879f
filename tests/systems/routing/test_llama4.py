"""Llama 4's router: the weight of the one expert stands on its input."""

import pytest
import torch
from helpers.router_cases import make_context, make_hidden, make_router, make_spec, text_context


@pytest.fixture
def router():
    torch.manual_seed(0)
    return make_router("llama4", spec=make_spec(num_experts_per_tok=1))


def test_the_input_is_scaled_and_the_output_taken_whole(router):
    context = make_context()
    hidden = make_hidden(context)
    decision = router(hidden, context)
    best, index = (hidden.double() @ router.weight.double().T).max(-1)
    assert torch.equal(decision.expert_index[:, 0], index)
    assert torch.equal(decision.expert_weight, torch.ones(len(hidden), 1))
    torch.testing.assert_close(decision.input_scale.double(), best.sigmoid(), atol=1e-6, rtol=0)
    assert decision.router_probs.sum(-1).allclose(torch.ones(len(hidden)))


def test_logits_beyond_float32_s_sigmoid_still_choose(router):
    context = text_context(1, 8)
    hidden = make_hidden(context) * 1000
    assert (router(hidden, context).router_logits.sigmoid() == 1).sum(-1).max() > 1
    expected = (hidden @ router.weight.T).argmax(-1)
    assert torch.equal(router(hidden, context).expert_index[:, 0], expected)


def test_the_gate_learns_through_the_input(router):
    context = text_context(1, 5)
    hidden = make_hidden(context)
    (hidden * router(hidden, context).input_scale[:, None]).square().sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_more_than_one_slot_is_refused():
    with pytest.raises(ValueError, match="'llama4' of layer 1 .* num_experts_per_tok=2: set it to 1"):
        make_router("llama4")
