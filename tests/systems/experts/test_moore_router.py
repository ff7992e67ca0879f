"""The mixing vectors of MOORE: a task, or a modality, weighs all experts."""

import torch
from helpers.router_cases import make_context, make_hidden, make_router, weight_table

from hf_moe.modeling.overrides import RoutingOverrides


def test_a_task_or_a_modality_weighs_all_experts():
    context = make_context(condition_ids={"task": torch.tensor([1, 0, 7])})
    for options, ids in ({}, context.condition("task", "cpu")), ({"conditioning": "modality"}, context.modality_ids):
        router = make_router("moore", options)
        with torch.no_grad():
            assert (router.mixing == 1 / 8).all() and router.idle_parameters() == 8 * (len(router.mixing) - 1)
            assert len(router.mixing) == (4 if options else 2) and router.mixing.normal_().min() < 0
        table = weight_table(router(make_hidden(context), context)).view(30, 8)
        expected = torch.cat([router.mixing, torch.zeros(8, 8)])[ids.flatten()]
        assert torch.equal(table, expected)
    context.overrides = RoutingOverrides(disabled_experts={1: [2]})
    assert not weight_table(router(make_hidden(context), context))[:, 2].any()
