"""Isolated banks of experts behind one numbering: sorted once, each computed as if it were alone."""

import pytest
import torch

from hf_moe import HfMoeConfig
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.dispatch import Dispatch
from hf_moe.modeling.expert_banks import ExpertBanks
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec


SIZES, WIDTHS, HIDDEN = [2, 3, 1], [16, 8, 24], 12


def banks_of(backend: str) -> ExpertBanks:
    torch.manual_seed(0)
    config = HfMoeConfig()
    config._experts_implementation = backend
    banks = {}
    for name, size, width in zip("abc", SIZES, WIDTHS, strict=True):
        banks[name] = FfnExperts(config, MoELayerSpec(0, HIDDEN, size, 2, width))
        banks[name].initialize(0.5)
    return ExpertBanks(banks, SIZES)


def assignment_of(tokens: int = 40, slots: int = 4) -> ExpertAssignment:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(7, generator=generator)[:slots] for _ in range(tokens)])  # 6 is empty
    weight = torch.rand(tokens, slots, generator=generator).masked_fill(index == 6, 0.0)
    return ExpertAssignment(index, weight, num_experts=6)


def one_by_one(banks: ExpertBanks, hidden: torch.Tensor, decision: ExpertAssignment) -> torch.Tensor:
    """Return the sum of the banks, each of which sorts its own slots."""
    output, start = torch.zeros_like(hidden), 0
    for name, size in zip(banks.names, banks.sizes, strict=True):
        inside = (decision.expert_index >= start) & (decision.expert_index < start + size)
        index = (decision.expert_index - start).masked_fill(~inside, size)
        weight = decision.expert_weight.masked_fill(~inside, 0.0)
        output = output + getattr(banks, name)(hidden, ExpertAssignment(index, weight, size))
        start += size
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banks_sorted_once_equal_banks_sorted_alone(dtype):
    banks, decision = banks_of("ragged").to(dtype), assignment_of()
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for run in (banks, lambda *inputs: one_by_one(banks, *inputs)):
        banks.zero_grad()
        inputs = hidden.clone().requires_grad_()
        output = run(inputs, decision)
        output.float().square().sum().backward()
        results.append([output.detach(), inputs.grad, *(parameter.grad.clone() for parameter in banks.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_sorts_its_slots_once(monkeypatch):
    calls, sort = [], Dispatch.__init__
    monkeypatch.setattr(Dispatch, "__init__", lambda *args: calls.append(1) or sort(*args))
    banks_of("ragged")(torch.randn(40, HIDDEN), assignment_of())
    assert len(calls) == 1


def test_every_bank_runs_through_its_own_forward():
    """Weights that are offloaded arrive by a hook on the module that holds them."""
    banks, entered = banks_of("ragged"), []
    for name in banks.names:
        getattr(banks, name).register_forward_pre_hook(lambda *_, name=name: entered.append(name))
    banks(torch.randn(40, HIDDEN), assignment_of())
    assert entered == banks.names


def test_banks_agree_on_every_backend():
    hidden, decision = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2)), assignment_of()
    expected = banks_of("eager")(hidden, decision)
    for backend in ("ragged", "batched_mm"):
        torch.testing.assert_close(banks_of(backend)(hidden, decision), expected, atol=1e-5, rtol=1e-5)


def test_banks_without_any_slot_get_gradients_of_zeros():
    banks, decision = banks_of("ragged"), assignment_of()
    decision.expert_index = decision.expert_index.masked_fill(decision.expert_index >= 2, 6)
    banks(torch.randn(40, HIDDEN), decision).sum().backward()
    assert banks.a.down_proj.grad.abs().sum() > 0
    assert banks.b.down_proj.grad.abs().sum() == 0 and banks.c.gate_up_proj.grad.abs().sum() == 0
