"""HMoE: experts of unequal width, and the penalty that lets a router use the narrow ones."""

import pytest
import torch
from helpers.mechanisms import TEXT
from helpers.router_cases import EAGER
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, MoeConfig
from hf_moe.configuration.systems import load_system
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.modeling.configured_parts import build_block
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.objectives.load_balance import LoadBalance
from hf_moe.modeling.routing_context import RoutingContext


HIDDEN, WIDTHS = 16, list(range(9, 24, 2))
SPEC = MoELayerSpec(1, HIDDEN, 8, 2, 16, banks=tuple((f"e{width}", 1, width) for width in WIDTHS))


def make_block(seed=0):
    torch.manual_seed(seed)
    banks = {name: {"num_experts": count, "intermediate_size": width} for name, count, width in SPEC.banks}
    router = {"name": "dynamic_moe_top_p", "top_p_threshold": 0.6}
    block = build_block(EAGER, MoeConfig(expert_banks=banks, router=router), SPEC)
    initialize_mechanisms(block, 0.3)
    return block


def penalty(spec, decision, context, **options):
    return LoadBalance([spec], 0.01, shares="tokens", **options)({1: decision}, context)


@pytest.mark.parametrize("widths", [WIDTHS, [16] * 8])
def test_the_penalty_is_that_of_the_equation(widths):
    spec = MoELayerSpec(1, HIDDEN, 8, 2, 16, banks=tuple((f"e{i}", 1, width) for i, width in enumerate(widths)))
    hidden = torch.randn(2, 50, HIDDEN, generator=torch.Generator().manual_seed(1))
    context = RoutingContext.all_text(hidden)
    decision = make_block().router(hidden.flatten(0, 1), context)
    chosen = F.one_hot(decision.expert_index, 9).amax(1)[:, :8].view(2, 50, 8).float()
    means = (chosen * torch.tensor(widths)).mean(1) * decision.router_probs.view(2, 50, 8).mean(1)
    found = penalty(spec, decision, context, by_width=True)
    torch.testing.assert_close(found, 8 * means.sum(-1) / 16)
    assert torch.allclose(found, penalty(spec, decision, context)) == (widths != WIDTHS)


def test_experts_in_banks_equal_experts_padded_to_the_widest():
    banks, padded = make_block().experts, FfnExperts(EAGER, MoELayerSpec(1, HIDDEN, 8, 2, 23))
    states = []
    for state in banks.states():
        wider = (0, 0, 0, 23 - state["down_proj"].shape[-1])
        halves = [F.pad(half, wider) for half in state["gate_up_proj"].chunk(2)]
        states.append({"gate_up_proj": torch.cat(halves), "down_proj": F.pad(state["down_proj"], wider[2:])})
    padded.take(states)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(40)])
    decision, hidden = ExpertAssignment(index, torch.rand(40, 3), 8), torch.randn(40, HIDDEN)
    torch.testing.assert_close(banks(hidden, decision), padded(hidden, decision), atol=1e-5, rtol=1e-5)


def test_profiles_keep_the_parameters_of_equal_experts():
    record = load_system("hmoe_heterogeneous")
    for fields in (record.model, record.variants["hybrid"]):
        banks = fields["expert_banks"].values()
        assert sum(bank["num_experts"] for bank in banks) == 8
        assert sum(bank["num_experts"] * bank["intermediate_size"] for bank in banks) == 8 * 2048


def test_the_widest_experts_bound_the_active_parameters(tmp_path):
    banks = {f"e{width}": {"num_experts": 1, "intermediate_size": width} for width in WIDTHS}
    counts = []
    for slots in (1, 2, 3):
        moe = {"expert_banks": banks, "num_experts_per_tok": slots}
        model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**TEXT), moe_config=moe))
        model.save_pretrained(tmp_path / str(slots))
        counts.append(inspect_checkpoint(tmp_path / str(slots))["parameters_active"]["text"])
    per_neuron = 3 * TEXT["hidden_size"] * TEXT["num_hidden_layers"]
    assert [counts[1] - counts[0], counts[2] - counts[1]] == [21 * per_neuron, 19 * per_neuron]


def trained(coef, steps=300):
    """Return the mean active width of a token, and the share of the two widest experts among those in use."""
    block, objective = make_block(), LoadBalance([SPEC], coef, shares="tokens", by_width=True)
    maps = torch.randn(4, HIDDEN, HIDDEN) / 4
    optimizer = torch.optim.Adam(block.parameters(), 3e-3)
    for _ in range(steps):
        hidden = torch.randn(128, HIDDEN)
        kind = hidden[:, :4].argmax(-1)
        context = RoutingContext.all_text(hidden[None])
        output, decision = block.route(block.gate, block.experts, hidden, context)
        target = torch.tanh(torch.einsum("td,tdo->to", hidden, maps[kind]))
        loss = F.mse_loss(output, target) + coef * objective({1: decision}, context).mean()
        objective.accumulate({1: decision}, context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.end_step()
    used = F.one_hot(decision.expert_index, 9).amax(1)[:, :8].float()
    return (used @ torch.tensor(WIDTHS).float()).mean().item(), (used[:, 6:].sum() / used.sum()).item()


def test_the_penalty_lowers_the_active_width():
    (width, wide), (plain_width, plain_wide) = trained(0.5), trained(0.0)
    assert width < 0.9 * plain_width and wide < 0.9 * plain_wide
