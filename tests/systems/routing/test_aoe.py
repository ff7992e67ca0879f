"""Autonomy of experts: the experts' own activations choose them, and are computed once."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.layers import make_layer, run
from helpers.router_cases import make_router, make_spec
from torch.nn import functional as F

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.construction.conversion import convert_experts, convert_router
from hf_moe.construction.in_place import from_host
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.modeling.experts.aoe import AutonomousExperts


RANK = 6
TOO_MANY_SLOTS = make_spec(num_experts_per_tok=9)
PAIR = {"kind": {"name": "aoe", "d_low": RANK}, "router": {"name": "aoe", "d_low": RANK}}


def by_definition(layer, hidden: torch.Tensor) -> torch.Tensor:
    """Return what all experts compute in full, weighted where they are among the two of the largest norms."""
    experts, first = layer.experts, layer.gate.gate_in_proj
    latents = torch.einsum("td,erd->ter", hidden, first)
    probs = latents.square().sum(-1).sqrt().softmax(-1)  # (T, E)
    weight = probs * (probs >= probs.topk(2).values[:, -1:])
    gate = F.silu(torch.einsum("ter,efr->tef", latents, experts.gate_out_proj))
    inner = gate * torch.einsum("td,efd->tef", hidden, experts.up_proj)
    return torch.einsum("te,tef,edf->td", weight, inner, experts.down_proj)


def test_the_layer_is_its_definition():
    layer, hidden = make_layer(**PAIR), torch.randn(1, 50, 16)
    output, context = run(layer, hidden)
    torch.testing.assert_close(output[0], by_definition(layer, hidden[0]), atol=1e-5, rtol=1e-5)
    assert context.decisions[1].latents is None, "the experts have taken them out"
    assert context.decisions[1].expert_weight.sum(-1).max() < 0.99
    gradient, expected = (
        torch.autograd.grad(value.square().sum(), list(layer.parameters()))
        for value in (run(layer, hidden)[0], by_definition(layer, hidden[0]))
    )
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [1, 2])
def test_weights_are_divided_by_their_sum_where_asked_and_several(slots):
    router = {**PAIR["router"], "norm_topk_prob": True}
    _, context = run(make_layer(slots=slots, **PAIR | {"router": router}), torch.randn(1, 50, 16))
    sums = context.decisions[1].expert_weight.sum(-1)
    assert (sums < 0.9).any() if slots == 1 else torch.allclose(sums, torch.ones(50))


def test_no_weight_chooses_except_the_experts_own():
    layer, hidden = make_layer(**PAIR), torch.randn(1, 200, 16)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes.pop("gate.gate_in_proj") == (8, RANK, 16)
    assert {(8, 16), (16, 8)}.isdisjoint(shapes.values()) and all(name.startswith("experts.") for name in shapes)
    counts = []
    for scale in (1, 3):
        layer.gate.gate_in_proj.data[3] *= scale
        counts.append((run(layer, hidden)[1].decisions[1].expert_index == 3).sum())
    assert counts[0] < 150 < counts[1]


def test_each_cluster_comes_to_an_expert_of_its_own():
    """Two clusters whose targets conflict, 300 steps, without any balance loss."""
    options = {"d_low": 4}
    layer = make_layer(experts=4, slots=1, std=0.1, kind={"name": "aoe", **options}, router={"name": "aoe", **options})
    centres, maps = torch.randn(2, 16), torch.randn(2, 16, 16) / 4
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    for _ in range(300):
        cluster = torch.randint(2, (128,))
        hidden = centres[cluster] + 0.3 * torch.randn(128, 16)
        output, context = run(layer, hidden[None])
        target = torch.einsum("td,tde->te", hidden, maps[cluster])
        optimizer.zero_grad()
        F.mse_loss(output[0], target).backward()
        optimizer.step()
    share = torch.zeros(2, 4).index_put((cluster, context.decisions[1].expert_index[:, 0]), torch.ones(()), True)
    share = share / share.sum(-1, keepdim=True)
    assert (share.amax(-1) > 0.8).all() and share.argmax(-1).unique().numel() == 2


@torch.no_grad()
def test_all_first_factors_and_the_chosen_experts_are_active(tmp_path):
    moe = {"num_experts": 4, "expert_intermediate_size": 20, "experts": "aoe", "router": "aoe"}
    model = from_host(small_host("llama").config.to_dict(), moe_config=moe)
    statistics = RoutingStatistics()
    statistics.update(model(input_ids=torch.arange(5, 25)[None], output_routing=True).routing)
    found = active_parameters(model, statistics)["text"]
    layer, number = model.moe_layers()[0], len(model.moe_layers())
    idle = 2 * number * sum(parameter[0].numel() for parameter in layer.experts.parameters())
    assert found == sum(parameter.numel() for parameter in model.parameters()) - idle
    model.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path)["parameters_active"]["text"] == found


def test_what_does_not_go_together_is_refused():
    for moe, message in (
        ({"kind": "aoe"}, "'top_k' hands latents of width None to experts that go on from width 5"),
        ({"router": "aoe"}, "'aoe' hands latents of width 5 to experts that go on from width None"),
        ({"kind": "aoe", "router": {"name": "aoe", "d_low": 4}}, "width 4 to experts that go on from width 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer(**moe)
    for build in (
        lambda: AutonomousExperts(None, make_spec(gated=False)),
        lambda: make_router("aoe", spec=TOO_MANY_SLOTS),
    ):
        with pytest.raises(ValueError, match="a gate and no biases|num_experts_per_tok=9 must lie in"):
            build()
    block = {"name": "chain_of_experts", "independent_routers": False}
    with pytest.raises(ValueError, match="choose a block that decides anew"):
        run(make_layer(**PAIR, block=block), torch.randn(1, 4, 16))
    model = from_host(small_host("llama"), moe_config={"num_experts": 4})
    with pytest.raises(ValueError, match="go together"):
        convert_router(model, "aoe")
    with pytest.raises(ValueError, match="'aoe' cannot start as feed-forwards"):
        convert_experts(model, "aoe")
