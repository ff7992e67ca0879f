"""Grove experts: one adjugate expert for each group of a token, and a start that changes nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.router_cases import EAGER, make_spec

from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.construction.conversion import convert_experts
from hf_moe.construction.in_place import from_host
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture
from hf_moe.modeling.dispatch import Dispatch
from hf_moe.modeling.experts.grove_moe import GroveExperts, of_groups
from hf_moe.modeling.initialisation import initialize_mechanisms


def make_experts(**options) -> GroveExperts:
    torch.manual_seed(0)
    experts = GroveExperts(EAGER, make_spec(), adjugate_size=8, **options)
    initialize_mechanisms(experts, 0.3)
    return experts


def chosen(tokens: int = 40, slots: int = 3) -> ExpertAssignment:
    index = torch.stack([torch.randperm(9)[:slots] for _ in range(tokens)])  # 8 is empty
    return ExpertAssignment(index, torch.rand(tokens, slots).masked_fill(index == 8, 0.0), 8)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_once_for_a_group_equals_once_for_an_expert(size):
    experts, hidden = make_experts(adjugate_init="normal", experts_per_group=size), torch.randn(40, 32)
    decision = chosen()
    by_expert = ExpertAssignment(decision.expert_index // size, decision.expert_weight, 8 // size)
    expected = experts.routed(hidden, decision) + 0.05 * experts.adjugate(hidden, by_expert)
    torch.testing.assert_close(experts(hidden, decision), expected, atol=1e-5, rtol=1e-5)
    groups = [{expert // size for expert in row if expert < 8} for row in decision.expert_index.tolist()]
    assert decision.signals["adjugates"].tolist() == [len(row) for row in groups]


@pytest.mark.parametrize(("slots", "size"), [(3, 2), (4, 2), (4, 4), (5, 4)])
def test_adjugates_of_a_token_reach_both_bounds(slots, size):
    near = torch.arange(slots)[None]
    far = torch.arange(8).view(-1, size).T.reshape(1, -1)[:, :slots]
    counts = []
    for index in (near, far):
        once = of_groups(ExpertAssignment(index, torch.full(index.shape, 0.5), 8), size)
        counts.append(int((once.expert_index < 8 // size).sum()))
        assert once.expert_weight.sum() == slots / 2
    assert counts == [math.ceil(slots / size), min(slots, 8 // size)]


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"adjugate_scale": 0.0, "adjugate_init": "normal"}])
def test_a_converted_model_starts_as_the_one_before(change):
    model = from_host(small_host("llama"), moe_config={"num_experts": 4, "num_experts_per_tok": 2}, noise=0.3)
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids).logits
    convert_experts(model, "grove_moe", **change)
    assert torch.equal(model(input_ids=ids).logits, expected)
    if not change:
        model.moe_layers()[0].experts.adjugate.down_proj.normal_()
        assert not torch.equal(model(input_ids=ids).logits, expected)


def test_adjugates_that_start_at_zero_learn():
    experts = make_experts()
    experts(torch.randn(40, 32), chosen()).square().sum().backward()
    assert experts.adjugate.down_proj.grad.any() and not experts.adjugate.gate_up_proj.grad.any()


def test_slots_and_merged_experts_have_their_adjugates():
    experts, hidden, eye = make_experts(adjugate_init="normal"), torch.randn(8, 32), torch.eye(8)
    expected = experts(hidden, ExpertAssignment(torch.arange(8)[:, None], torch.ones(8, 1), 8))
    torch.testing.assert_close(experts(hidden, SlotMixture(eye[None], eye[None], 8)), expected)
    torch.testing.assert_close(experts(hidden, ParameterMixture(eye, torch.arange(8), 8)), expected)


@torch.no_grad()
def test_active_parameters_count_the_adjugates_that_ran(tmp_path):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "experts": {"name": "grove_moe", "adjugate_size": 8}}
    model, counts = from_host(small_host("llama"), moe_config=moe), []
    for near in (True, False):
        for layer in model.moe_layers().values():
            layer.gate.weight.copy_(torch.tensor([2.0, 1.0 if near else -1.0, -1.0 if near else 1.0, -2.0])[:, None])
        statistics = RoutingStatistics()
        statistics.update(model(input_ids=torch.arange(5, 25)[None], output_routing=True).routing)
        counts.append(active_parameters(model, statistics)["text"])
    width = model.config.get_text_config().hidden_size
    assert counts[1] - counts[0] == 3 * 8 * width * len(model.moe_layers())
    model.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path)["parameters_active"]["text"] == counts[1]


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ValueError, match="experts_per_group=3 must divide num_experts=8"):
        make_experts(experts_per_group=3)


def test_slots_are_sorted_once_for_experts_and_adjugates(monkeypatch):
    experts, hidden, decision = make_experts(adjugate_init="normal"), torch.randn(40, 32), chosen()
    expected = experts(hidden, decision)
    experts.routed.config = experts.adjugate.config = SimpleNamespace(_experts_implementation="ragged")
    made, create = [], Dispatch.__init__
    monkeypatch.setattr(Dispatch, "__init__", lambda *args: (made.append(1), create(*args))[1])
    torch.testing.assert_close(experts(hidden, decision), expected, atol=1e-5, rtol=1e-5)
    assert len(made) == 1
