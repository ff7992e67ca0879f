"""Statistics of routers that mix experts instead of choosing some."""

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.modeling.decisions import ParameterMixture, SlotMixture
from hf_moe.modeling.routing_context import RoutingContext


def statistics_of(decision, modality, mask):
    context = RoutingContext(modality_ids=torch.tensor(modality), token_mask=torch.tensor(mask, dtype=torch.bool))
    context.decisions[0] = decision
    statistics = RoutingStatistics()
    statistics.update(context)
    return statistics


def test_a_merged_expert_runs_once_in_the_shares_of_its_parts():
    merged = ParameterMixture(torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0, 1, 1]), 3)
    found = statistics_of(merged, [[0, 0, 1, 1]], [[1, 1, 1, 0]])
    assert torch.allclose(found.shares(0)[:2], torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]))
    assert found.active_experts(0)[:2].tolist() == [1.0, 1.0] and found.tokens[0].tolist()[:2] == [2, 1]
    assert found.entropy(0)[1].item() == pytest.approx(0.6309, abs=1e-4)  # log 2 / log 3


def test_a_slot_runs_once_in_the_shares_of_its_tokens():
    # One row of four tokens; two experts with a slot each.
    dispatch = torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.0, 0.25], [0.0, 0.75]]])
    found = statistics_of(SlotMixture(dispatch, dispatch, 2), [[0, 0, 0, 1]], [[1, 1, 1, 1]])
    assert found.runs(0)[:2].tolist() == [[1.0, 0.25], [0.0, 0.75]]
    assert found.runs(0).sum().item() == 2


def test_tokens_in_another_order_keep_their_modality():
    dispatch = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])  # two groups of two places
    mixed = SlotMixture(
        dispatch, dispatch, 2, order=torch.tensor([2, 0, 1, 4])
    )  # token 3 is padding, a place is empty
    found = statistics_of(mixed, [[0, 0, 1, 1]], [[1, 1, 1, 0]])
    assert found.runs(0)[:2].tolist() == [[1.0, 2.0], [1.0, 0.0]]


def test_several_passes_add_up():
    merged = ParameterMixture(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 2)
    found = statistics_of(merged, [[0]], [[1]])
    context = RoutingContext(modality_ids=torch.tensor([[0]]), token_mask=torch.ones(1, 1, dtype=torch.bool))
    context.decisions[0] = ParameterMixture(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 2)
    found.update(context)
    assert found.shares(0)[0].tolist() == [0.5, 0.5] and found.tokens[0][0] == 2


def test_merged_experts_count_as_one_active_expert():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = HfMoeForConditionalGeneration(
        HfMoeConfig.from_system("meo", text_config=LlamaConfig(**sizes, vocab_size=64))
    )
    statistics = RoutingStatistics()
    statistics.update(model.eval()(torch.arange(2, 18)[None], output_routing=True).routing)
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 32 * model.moe_layers()[0].spec.expert_intermediate_size
    assert active_parameters(model, statistics) == {"text": total - 2 * 7 * expert}
