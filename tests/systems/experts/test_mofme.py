"""Feature-modulated experts: one feed-forward for all, and a modulation for each."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from helpers.router_cases import EAGER, make_spec
from torch.nn import functional as F

from hf_moe.construction.in_place import from_host
from hf_moe.modeling.decisions import ExpertAssignment, SlotMixture
from hf_moe.modeling.experts.mofme import ModulationExperts
from hf_moe.modeling.initialisation import initialize_mechanisms


def make_experts(std: float = 0.3, spec=None, **options) -> ModulationExperts:
    torch.manual_seed(0)
    experts = ModulationExperts(EAGER, spec or make_spec(), modulation_rank=3, **options)
    initialize_mechanisms(experts, std)
    return experts


def chosen(tokens: int = 60, slots: int = 3) -> ExpertAssignment:
    index = torch.stack([torch.randperm(9)[:slots] for _ in range(tokens)])  # 8 is empty
    index[0] = 8
    return ExpertAssignment(index, torch.rand(tokens, slots).masked_fill(index == 8, 0.0), 8)


@torch.no_grad()
@pytest.mark.parametrize("modulation", ["full", "lowrank", "vector"])
@pytest.mark.parametrize("base", ["glu", "identity"])
def test_experts_follow_the_formula_with_one_pass_of_the_trunk(modulation, base):
    experts = make_experts(spec=make_spec(bias=True), modulation=modulation, base_block=base)
    for parameter in experts.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    decision, x, passes = chosen(), torch.randn(60, 32), []
    experts.trunk.register_forward_pre_hook(lambda layer, arguments: passes.append(arguments[0].shape))
    found = experts(x, decision)
    assert passes == [(60, 32)]
    z = x
    if base == "glu":
        a, b = experts.base_proj.weight.chunk(2)
        z = F.silu(x @ a.T) * (x @ b.T)
    maps = {"full": lambda: experts.modulation_out, "vector": lambda: torch.zeros(8, 64, 32)}
    maps["lowrank"] = lambda: experts.modulation_out @ experts.modulation_in
    scale, shift = (torch.einsum("td,eod->teo", z, maps[modulation]()) + experts.modulation_bias).chunk(2, -1)
    outputs = (1 + scale) * z[:, None] + shift  # (T, E, d)
    expected = experts.trunk(torch.einsum("te,ted->td", decision.weight_table(), outputs))
    expected[0] = 0.0  # a token without experts
    assert_near(found, expected, 1e-5)
    eye = torch.eye(8)[None]
    once = ExpertAssignment(torch.arange(8)[:, None], torch.ones(8, 1), 8)
    assert_near(experts(x[:8], SlotMixture(eye, eye, 8)), experts(x[:8], once), 1e-5)


@pytest.mark.parametrize(("modulation", "share"), [("lowrank", 0.3), ("vector", 0.25)])
def test_they_hold_a_fraction_of_the_parameters_of_experts(modulation, share):
    spec = make_spec(hidden_size=128, expert_intermediate_size=256)
    experts = ModulationExperts(EAGER, spec, modulation=modulation)
    assert sum(parameter.numel() for parameter in experts.parameters()) < share * 8 * 3 * 128 * 256


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("modulation", ["full", "lowrank", "vector"])
def test_a_hosted_model_starts_as_its_host_whatever_the_routing(name, modulation):
    host, ids = small_host(name), torch.arange(5, 25)[None]
    expected = host(input_ids=ids).logits
    experts = {"name": "mofme", "modulation": modulation, "base_block": "identity"}
    model = from_host(host, moe_config={"num_experts": 4, "num_experts_per_tok": 2, "experts": experts})
    for layer in model.moe_layers().values():
        layer.router.weight.normal_()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    next(iter(model.moe_layers().values())).experts.modulation_bias[0] = 0.5
    assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3
    fresh = from_host(small_host(name), moe_config={"num_experts": 4, "router": "mofme", "experts": "mofme"})
    assert fresh(input_ids=ids).logits.isfinite().all()


def test_feed_forwards_that_differ_are_no_equal_start():
    experts = make_experts(base_block="identity")
    state = {"gate_up_proj": torch.randn(32, 32), "down_proj": torch.randn(32, 16)}
    with torch.no_grad():
        experts.modulation_bias.normal_()
    other = {**state, "down_proj": torch.randn(32, 16)}
    assert experts.take([state] * 8) and not experts.take([state] * 7 + [other])
    assert not experts.modulation_bias.any() and not experts.modulation_out.any() and experts.widths == [16] * 8
    assert torch.equal(experts.trunk.up_proj.weight, state["gate_up_proj"][16:])
    assert not make_experts().take([state] * 8)
    with pytest.raises(ValueError, match="such experts cannot be copies of it"):
        experts.take([{"gate_up_proj": torch.randn(30, 32), "down_proj": torch.randn(32, 15)}] * 8)


def test_swapped_modulations_raise_the_loss():
    experts, generator = make_experts(0.2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(experts.parameters(), lr=1e-2)

    def loss(first: int) -> torch.Tensor:
        x, kind = torch.randn(128, 32, generator=generator), torch.arange(128) % 2
        target = torch.where(kind[:, None] == 0, x.roll(1, -1).tanh(), -x.square())
        index = (kind if first == 0 else 1 - kind)[:, None]
        return F.mse_loss(experts(x, ExpertAssignment(index, torch.ones(128, 1), 8)), target)

    for _ in range(200):
        optimizer.zero_grad()
        loss(0).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(1) > 1.5 * loss(0)
