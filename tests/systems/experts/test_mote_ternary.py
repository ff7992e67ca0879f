"""Ternary experts: three values for a weight, gradients through the rounding, and a branch beside a frozen one."""

from types import SimpleNamespace

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.layers import fitted, make_layer
from helpers.near import assert_near
from helpers.router_cases import make_spec

from hf_moe.construction.expert_sources import build_source, fill_layer
from hf_moe.construction.in_place import from_host
from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture
from hf_moe.modeling.experts.mote_ternary import TernaryExperts
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.ternary import TokenRounding
from hf_moe.training.parts import fingerprints, train_only


def make_experts(backend="eager", gated=True, bias=False, **options) -> TernaryExperts:
    torch.manual_seed(0)
    spec = make_spec(gated=gated, bias=bias, hidden_size=32, expert_intermediate_size=18)
    experts = TernaryExperts(SimpleNamespace(_experts_implementation=backend), spec, **options)
    initialize_mechanisms(experts, 0.3)
    return experts.double()  # in which no sum is near enough to a step's edge for its order to matter


def chosen(tokens: int = 40, slots: int = 3) -> ExpertAssignment:
    index = torch.stack([torch.randperm(9)[:slots] for _ in range(tokens)]) // 2 * 2  # 8 is empty, odd ones idle
    return ExpertAssignment(index, torch.rand(tokens, slots).double().masked_fill(index == 8, 0.0), 8)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_weight_has_three_values_and_a_gradient(by_row):
    experts = make_experts(weight_scale="row" if by_row else "matrix")
    for name in experts.stack_names:
        latent, read = getattr(experts, f"{name}_latent"), getattr(experts, name)
        for whole, matrix in zip(latent, read, strict=True):
            parts = zip(whole.chunk(2), matrix.chunk(2), strict=True) if name == "gate_up_proj" else [(whole, matrix)]
            for own, part in parts:
                scale = own.abs().mean(-1 if by_row else (0, 1), keepdim=True)
                assert_near(part / scale, (own / scale).round().clamp(-1, 1), 1e-6)
        given = torch.randn_like(read)
        read.backward(given)
        assert torch.equal(latent.grad, given)


@pytest.mark.parametrize("kind", [{}, {"weight_scale": "row"}, {"gated": False, "bias": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_every_backend_computes_the_eager_form(kind, packed):
    expected, hidden, decision = make_experts(**kind), torch.randn(40, 32).double(), chosen()
    output = expected(hidden, decision)
    read = expected.rounding(hidden)
    inner = torch.einsum("td,efd->tef", read, getattr(expected, expected.input_name))
    inner = inner + (expected.up_proj_bias if expected.has_bias else 0.0)
    gate, up = inner.chunk(2, -1) if expected.has_gate else (inner, 1.0)
    inner = TokenRounding(8)(torch.nn.functional.silu(gate) * up)
    every = torch.einsum("tef,edf->ted", inner, expected.down_proj)
    table = torch.zeros(40, 9).double().scatter_add(1, decision.expert_index, decision.expert_weight)[:, :8]
    assert_near(output, torch.einsum("te,ted->td", table, every), 1e-9)
    for backend in ("eager", "ragged", "batched_mm"):  # grouped_mm takes no float64; the suite runs it
        experts = make_experts(backend, **kind)
        if packed:
            experts.pack()
        assert_near(experts(hidden, decision), output, 1e-6)


def test_slots_and_merged_experts_are_rounded_too():
    experts, hidden, eye = make_experts(), torch.randn(8, 32).double(), torch.eye(8).double()
    expected = experts(hidden, ExpertAssignment(torch.arange(8)[:, None], torch.ones(8, 1).double(), 8))
    experts.pack()
    assert_near(experts(hidden, SlotMixture(eye[None], eye[None], 8)), expected, 1e-6)
    assert_near(experts(hidden, ParameterMixture(eye, torch.arange(8), 8)), expected, 1e-6)


def test_the_stage_of_experts_moves_nothing_else():
    model = from_host(small_host("llama"), system="mote_ternary").train()
    train_only(model, ["routers", "experts/experts.*"])
    before, ids = fingerprints(model), torch.arange(5, 45).view(2, 20)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.1)
    for _ in range(50):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, digest in fingerprints(model).items() if digest != before[name]}
    assert moved == {name for name in before if ".experts." in name or ".gate." in name}


def test_silent_experts_leave_the_logits_of_the_dense_host():
    checks, sources = [], [{"name": "copies", "beside": scale} for scale in (0.0, 1.0)]
    for source in sources:
        from_host(small_host("llama"), system="mote_ternary", source=source, on_check=checks.append)
    assert checks[0].logit_difference < 1e-6 and checks[1].logit_difference > 1e-3


def test_ternary_experts_learn_beside_a_frozen_branch():
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(2, 16, 16, generator=generator) / 8
    modality = torch.arange(128) % 2
    layer = make_layer(experts=4, slots=1, kind="mote_ternary", num_shared_experts=1)
    parent = {"gate_up_proj": 0.3 * torch.randn(48, 16), "down_proj": 0.3 * torch.randn(16, 24)}
    fill_layer(layer, [parent], build_source({"name": "copies", "beside": 1.0}))
    layer.shared_expert.requires_grad_(False)

    def batch():
        inputs = torch.randn(128, 16, generator=generator)
        inputs[:, 0] = 4.0 * modality - 2
        return inputs, inputs + layer.shared_expert(inputs) + torch.einsum("tij,tj->ti", shift[modality], inputs)

    inputs, targets = batch()
    dense = (inputs + layer.shared_expert(inputs) - targets).square().mean().item()
    assert fitted(layer, batch, 300) < 0.6 * dense
