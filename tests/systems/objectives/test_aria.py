"""Aria: balance over groups of experts, and the layer of Transformers."""

import pytest
import torch
from helpers.balance import balance
from helpers.near import assert_near
from helpers.router_cases import EAGER, make_hidden, make_router, make_spec, randomise, text_context
from transformers import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextMoELayer

from hf_moe.analysis.experts import visual_specialisation
from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.configuration.systems import load_system
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build


MODEL = load_system("aria").fields("model")
EXPERTS, SLOTS = MODEL["num_experts"], MODEL["num_experts_per_tok"]
BALANCE = MODEL["objectives"]["load_balance"]
SPEC = make_spec(num_experts=EXPERTS, num_experts_per_tok=SLOTS)


def test_the_layer_is_that_of_transformers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_num_experts": EXPERTS, "moe_topk": SLOTS}
    config = AriaTextConfig(**sizes, moe_num_shared_experts=MODEL["num_shared_experts"])
    config._experts_implementation = "eager"
    theirs = randomise(AriaTextMoELayer(config))
    router = make_router(MODEL["router"]["name"], spec=SPEC)
    router.weight.data.copy_(theirs.router.weight)
    experts = build("experts", get_mechanism("experts", "ffn"), {}, EAGER, SPEC)
    experts.load_state_dict({name: tensor.mT for name, tensor in theirs.experts.state_dict().items()})
    context = text_context(2, 5)
    hidden = make_hidden(context)
    output = experts(hidden, router(hidden, context)) + theirs.shared_experts(hidden)
    assert_near(output, theirs(hidden.view(2, 5, -1)).view(-1, 32), 1e-5)


def test_groups_are_balanced_and_experts_inside_them_may_specialise():
    one_of_each_group = torch.arange(0, EXPERTS, 8)[None]
    assert balance(BALANCE, one_of_each_group, EXPERTS) == pytest.approx(1.0)
    assert balance({**BALANCE, "expert_groups": None}, one_of_each_group, EXPERTS) == pytest.approx(8.0)


def test_groups_of_one_expert_give_the_usual_balance():
    index = torch.tensor([[0, 0, 0, 5, 9, 63]])
    single, none = ({**BALANCE, "expert_groups": groups} for groups in (EXPERTS, None))
    assert balance(single, index, EXPERTS) == pytest.approx(balance(none, index, EXPERTS))


@pytest.mark.parametrize(
    ("image", "expected"),
    [([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0, 1.0]), ([0, 0, 3, 4], [2.0, 0.0, 0.0, 1.0, 32.0])],
    ids=["blind", "an expert of images"],
)
def test_visual_specialisation_tells_experts_of_images(image, expected):
    context = text_context(2, 64)
    context.modality_ids[1] = 1 + torch.arange(64) % 2  # images and videos
    index = torch.cat([torch.arange(64) % 4, torch.tensor(image).repeat(16)])[:, None]
    context.decisions[0] = ExpertAssignment(index, torch.ones(128, 1), 5)
    statistics = RoutingStatistics()
    statistics.update(context)
    assert visual_specialisation(statistics)[0].tolist() == pytest.approx(expected)


def test_visual_specialisation_needs_both_modalities():
    context = text_context(1, 4)
    context.decisions[0] = ExpertAssignment(torch.zeros(4, 1).long(), torch.ones(4, 1), 5)
    statistics = RoutingStatistics()
    statistics.update(context)
    assert visual_specialisation(statistics) == {}
