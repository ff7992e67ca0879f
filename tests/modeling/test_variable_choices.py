"""Routers that give every token its own number of experts."""

import torch
from helpers.router_cases import make_context, make_router

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
