"""EvoMoE: experts that are spawned from one and made different, and a gate that becomes sparse."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.router_cases import make_experts, make_router, make_spec, text_context
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.expert_sources import build_source
from hf_moe.construction.in_place import from_host
from hf_moe.modeling.objectives.load_balance import LoadBalance
from hf_moe.training.sections import Stage
from hf_moe.training.stages import construct


def active(router, progress: float) -> float:
    """Return the mean number of experts of a token at a progress of the training."""
    context = text_context(1, 4096)
    context.progress = progress
    return (router.train()(torch.randn(4096, 32), context).expert_index < 8).sum(-1).float().mean().item()


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_unmasked_experts_compute_what_the_one_did_for_any_gate(rate):
    host = small_host("llama")
    dense = host.model.layers[0].mlp
    hidden = torch.randn(1, 64, 32)
    expected = dense(hidden)
    source = {"name": "masked_copies", "mask_rate": rate}
    layer = from_host(host, system="evomoe_dts", moe_config={"layers": [0]}, source=source).moe_layers()[0].train()
    decision = layer.gate(hidden[0], text_context(1, 64))
    found = layer.experts(hidden[0], decision) / decision.expert_weight.sum(-1, keepdim=True)
    assert (decision.expert_weight > 0).sum(-1).min() > 1
    assert torch.allclose(found, expected[0], atol=1e-5) == (rate == 0.0)


def test_masks_are_independent_and_leave_the_other_weights():
    dense = {"gate_up_proj": torch.randn(96, 32), "down_proj": torch.randn(32, 48), "down_proj_bias": torch.randn(32)}
    source = build_source({"name": "masked_copies", "mask_rate": 0.1})
    first, second = (source.expert([dense], expert, 48) for expert in range(2))
    for name in ("gate_up_proj", "down_proj"):
        zero, other = first[name] == 0, second[name] == 0
        assert zero.float().mean().item() == pytest.approx(0.1, abs=0.025)
        assert (zero & other).float().mean().item() == pytest.approx(0.01, abs=0.01)
        assert torch.equal(first[name][~zero], dense[name][~zero])
    assert torch.equal(first["down_proj_bias"], dense["down_proj_bias"])


def test_all_experts_run_when_it_is_hot_and_one_when_it_is_cold():
    torch.manual_seed(0)
    router = make_router("evomoe_dts", {"tau_max": 100.0, "tau_min": 0.02})
    router.weight.data.zero_()  # equal logits
    numbers = [active(router, progress) for progress in (0.0, 0.5, 0.8, 1.0)]
    assert numbers[0] == 8 and 1.05 < numbers[3] < 1.3
    assert numbers == sorted(numbers, reverse=True) and numbers[1] > numbers[2]


def test_a_stage_spawns_its_experts_from_the_dense_one_before_it():
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    dense = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config={"layers": []}))
    upcycle = {"system": "evomoe_dts", "moe_config": {"layers": [1], "num_experts": 2}}
    model = construct(dense, Stage("experts", [], construct={"upcycle": upcycle}), None, seed=0)
    experts, one = model.moe_layers()[1].experts.down_proj, dense.model.language_model.layers[1].mlp.down_proj.weight
    assert model.moe_layers()[1].router.mechanism_name == "evomoe_dts" and not torch.equal(*experts)
    assert all(
        0.05 < (expert == 0).float().mean() < 0.15 and ((expert == 0) | (expert == one)).all() for expert in experts
    )


def final_loss(seed: int, steps: int, **options) -> float:
    """Train on 64 words of eight kinds, with a map for each, and return the loss of inference."""
    torch.manual_seed(seed)
    spec = make_spec(hidden_size=16, expert_intermediate_size=8)
    router, experts, out = make_router("evomoe_dts", options, spec).train(), make_experts(spec), nn.Linear(16, 64)
    words, maps = torch.randn(64, 16), torch.randn(8, 16, 16) / 4
    labels = (torch.tanh(3 * (maps.repeat(8, 1, 1) @ words[..., None]).squeeze(-1)) @ torch.randn(16, 64)).argmax(-1)
    balance = LoadBalance([spec], 0.01, shares="tokens")
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters(), *out.parameters()], lr=5e-3)

    def loss(ids, progress):
        hidden, context = words[ids] + 0.3 * torch.randn(len(ids), 16), text_context(1, len(ids))
        context.progress = progress
        decision = context.decisions[1] = router(hidden, context)
        return F.cross_entropy(out(hidden + experts(hidden, decision)), labels[ids]), balance(
            context.decisions, context
        )

    for step in range(steps):
        task, balanced = loss(torch.randint(64, (128,)), step / steps)
        optimizer.zero_grad()
        (task + 0.01 * balanced[0]).backward()
        optimizer.step()
    router.eval()
    return loss(torch.arange(2048) % 64, 1.0)[0].item()


@pytest.mark.parametrize(
    "seed, steps", [(0, 200), *(pytest.param(seed, 600, marks=pytest.mark.slow) for seed in (0, 1, 2))]
)
def test_a_falling_temperature_learns_more_than_a_low_one(seed, steps):
    falling = final_loss(seed, steps, tau_max=2.0, tau_min=0.3)
    assert falling < 0.8 * final_loss(seed, steps, tau_max=0.05, tau_min=0.05)
