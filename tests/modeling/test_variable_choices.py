"""Routers that give every token its own number of experts."""

import pytest
import torch
from helpers.router_cases import make_context, make_router, text_context

from hf_moe.modeling.gating import from_mask


def test_slots_of_a_mask_hold_the_heaviest_chosen_experts():
    weight = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.1, 0.4, 0.2, 0.3], [0.1, 0.4, 0.0, 0.3]], requires_grad=True)
    chosen = torch.tensor([[True] * 4, [True, False, False, False], [True, False, True, True]])
    index, found = from_mask(chosen, weight, 3)
    assert index.tolist() == [[1, 3, 2], [0, 4, 4], [3, 0, 2]]
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.3, 0.2], [0.1, 0.0, 0.0], [0.3, 0.1, 0.0]]))
    found.sum().backward()
    assert weight.grad.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 1]]
    index, found = from_mask(chosen, weight)
    assert index.tolist() == [[0, 1, 2, 3], [0, 4, 4, 4], [0, 4, 2, 3]]
    assert torch.equal(found, weight * chosen)


# dselect_k


def test_a_modality_has_experts_of_its_own():
    router, context = make_router("dselect_k", {"conditioning": "modality"}), make_context()
    torch.nn.init.normal_(router.codes)
    decision = router(torch.randn(30, 32), context)
    image = context.modality_ids.flatten() == 1
    for tokens in (image, ~image):
        assert (decision.expert_weight[tokens] == decision.expert_weight[tokens][0]).all()
    assert not torch.equal(decision.expert_weight[image][0], decision.expert_weight[~image][0])


def test_a_row_of_an_unknown_condition_gets_no_expert():
    options = {"conditioning": "condition", "condition": "task", "num_conditions": 2}
    context = make_context(condition_ids={"task": torch.tensor([-1, 1, 2])})
    index = make_router("dselect_k", options)(torch.randn(30, 32), context).expert_index.view(3, 10, 2)
    assert (index[::2] == 8).all() and (index[1] < 8).all()


# evomoe_dts


def test_the_temperature_falls_as_its_schedule_says_and_stays():
    exp = make_router("evomoe_dts", {"tau_max": 4.0, "tau_min": 1.0, "tau_decay": 0.5})
    linear = make_router("evomoe_dts", {"tau_max": 4.0, "tau_min": 1.0, "tau_decay": 0.5, "tau_schedule": "linear"})
    assert [exp.temperature(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx([4, 2, 1, 1])
    assert [linear.temperature(share) for share in (0, 0.25, 0.5, 1)] == pytest.approx([4, 2.5, 1, 1])


def test_a_hard_gate_keeps_the_best_of_the_noisy_gates_alone():
    torch.manual_seed(0)
    router = make_router("evomoe_dts", {"hard_after": 0.5})
    hidden, context = torch.randn(1024, 32), text_context(1, 1024)
    context.progress = 0.4
    assert (router.train()(hidden, context).expert_index < 8).sum(-1).float().mean() > 4
    context.progress = 0.5
    decision = router(hidden, context)
    assert ((decision.expert_index < 8).sum(-1) == 1).all()
    best, weight = decision.router_logits.argmax(-1), decision.expert_weight.max(-1)
    assert 0.2 < (weight.indices == best).float().mean() < 0.9, "noise moves the choice"
    torch.testing.assert_close(weight.values, decision.router_probs.max(-1).values)


def test_inference_takes_the_best_expert_by_its_probability():
    decision = make_router("evomoe_dts")(torch.randn(64, 32), text_context(1, 64))
    probs = decision.router_logits.softmax(-1)
    assert torch.equal(decision.expert_index[:, 0], probs.argmax(-1))
    torch.testing.assert_close(decision.expert_weight[:, 0], probs.amax(-1))
