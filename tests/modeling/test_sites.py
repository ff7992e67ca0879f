"""Sites: every decision of a layer has its own statistics, overrides and place in the context."""

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, MoELayerSpec, RoutingOverrides
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.modeling.context import routers_of
from hf_moe.modeling.routing_context import RoutingContext


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
IDS = torch.arange(4, 24).view(2, 10)


def build(block="chain_of_experts", **moe):
    torch.manual_seed(0)
    text = LlamaConfig(**TEXT, pad_token_id=0, initializer_range=0.3)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "block": block, "objectives": {"load_balance": 0.1}, **moe}
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe)).eval()


def routing(model, **inputs):
    with torch.no_grad():
        return model(input_ids=IDS, output_routing=True, **inputs).routing


@pytest.mark.parametrize(
    ("fields", "site"),
    [
        ({}, 2),
        ({"part": "step1"}, "2.step1"),
        ({"place": "vision"}, "vision.2"),
        ({"place": "vision", "part": "attention"}, "vision.2.attention"),
    ],
)
def test_a_site_names_its_place_layer_and_part(fields, site):
    assert MoELayerSpec(2, 8, 4, 2, 8, **fields).site == site


def test_an_override_reaches_one_decision_of_a_layer():
    decisions = routing(build(), routing_overrides=RoutingOverrides(disabled_experts={"1.step1": [0, 3]})).decisions
    assert list(decisions) == [0, "0.step1", 1, "1.step1"]
    forbidden = [
        site for site, item in decisions.items() if not torch.isin(item.expert_index, torch.tensor([0, 3])).any()
    ]
    assert forbidden == ["1.step1"]


def test_a_site_that_no_router_has_is_refused():
    with pytest.raises(ValueError, match=r"'1.step2'.*0.step1"):
        routing(build(), routing_overrides=RoutingOverrides(disabled_experts={"1.step2": [0]}))


def test_every_decision_has_statistics_that_are_saved(tmp_path):
    model = build().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.end_step()
    objective = model.objectives.by_name["load_balance"]
    counts = {name: table.sum().item() for name, table in objective.named_buffers() if name.startswith("population")}
    # Two slots of a token, one in each step, of two rows of ten.
    assert counts == {f"population_{name}": 20 for name in ("0", "0_step1", "1", "1_step1")}
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path).objectives.by_name["load_balance"]
    assert torch.equal(loaded.population_1_step1, objective.population_1_step1)


@pytest.mark.parametrize(
    "block", ["cartesian_moe", "chain_of_experts", {"name": "mh_moe", "num_heads": 2, "parity": False}]
)
def test_every_decision_of_a_token_counts_as_work(block):
    model, statistics = build(block), RoutingStatistics()
    statistics.update(routing(model))
    layers = list(model.moe_layers().values())
    expert = sum(stack[0].numel() for stack in layers[0].experts_of(0).parameters())
    stored = sum(stack.numel() for layer in layers for stack in layer.experts.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    slots = sum(1 for router in routers_of(model).values() for _ in range(router.spec.num_experts_per_tok))
    pieces = 2 if isinstance(block, dict) else 1
    assert active_parameters(model, statistics)["text"] == total - stored + slots * pieces * expert


def test_the_rounds_of_a_token_count_as_work():
    model, statistics = build("smoe_stratified"), RoutingStatistics()
    context = routing(model)
    statistics.update(context)
    stacks = [stack for layer in model.moe_layers().values() for stack in layer.experts.parameters()]
    stored, total = (sum(item.numel() for item in items) for items in (stacks, model.parameters()))
    rounds = sum(decision.signals["rounds"].mean().item() for decision in context.decisions.values())
    assert 2 < rounds < 4
    expected = total - stored + int(rounds * 2 * stored / 8)
    assert active_parameters(model, statistics)["text"] == pytest.approx(expected, abs=1)


def test_the_pieces_of_a_token_share_its_row_and_modality():
    modality, mask = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, True], [False, True]])
    context = RoutingContext(modality, mask, condition_ids={"task": torch.tensor([3, 5])})
    pieces = context.split(2)
    assert pieces is context.split(2) and context.contexts() == [context, pieces]
    assert pieces.modality_ids.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert pieces.token_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert pieces.condition("task", modality.device).tolist() == [3] * 4 + [5] * 4
