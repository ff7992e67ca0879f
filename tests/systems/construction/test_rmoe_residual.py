"""Residual experts: one core and a residual of each, from a dense feed-forward and back to plain experts."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.layers import fitted, make_layer
from torch import nn

from hf_moe.construction.conversion import convert_experts
from hf_moe.construction.expert_sources import build_source, fill_layer
from hf_moe.construction.in_place import from_host


def dense_state(width=24, hidden=16):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def dense(state, hidden):
    gate, up = (hidden @ state["gate_up_proj"].T).chunk(2, -1)
    return (nn.functional.silu(gate) * up) @ state["down_proj"].T


def residual_layer(slots=2, noise_std=0.0):
    """Return a layer whose experts start as a dense feed-forward."""
    layer = make_layer(experts=4, slots=slots, kind="rmoe_residual")
    fill_layer(layer, [dense_state()], build_source("copies", noise_std=noise_std))
    return layer


def test_without_residuals_it_is_the_dense_feed_forward():
    layer, hidden = residual_layer(), torch.randn(1, 9, 16)
    assert not any(p.any() for name, p in layer.experts.named_parameters() if name.startswith("residual_"))
    torch.testing.assert_close(layer(hidden), dense(dense_state(), hidden), atol=1e-6, rtol=1e-6)


def test_a_dense_model_keeps_its_logits():
    checks = []
    fields = {"num_experts_per_tok": 2}
    from_host(small_host("llama"), system="rmoe_residual", source="copies", moe_config=fields, on_check=checks.append)
    assert checks[0].exact and checks[0].logit_difference < 1e-5


def test_the_core_is_the_mean_and_residuals_are_the_rest():
    experts = residual_layer(noise_std=0.1).experts.requires_grad_(False)
    torch.testing.assert_close(experts.residual_down_proj.mean(0), torch.zeros(16, 24), atol=1e-6, rtol=0)
    state, spread = dense_state()["down_proj"], 0.1 * dense_state()["down_proj"].std().item()
    assert (experts.down_proj - state).std().item() == pytest.approx(spread, rel=0.1)
    assert (experts.core_down_proj - state).std().item() == pytest.approx(spread / 2, rel=0.2)


def test_fresh_residuals_are_small_and_differ():
    experts = make_layer(kind={"name": "rmoe_residual", "residual_init_std": 1e-3}).experts
    assert experts.residual_gate_up_proj.std().item() == pytest.approx(1e-3, rel=0.1)
    assert experts.core_gate_up_proj.std().item() == pytest.approx(0.3, rel=0.1)


def test_core_and_residuals_added_are_plain_experts():
    fields = {"experts": "rmoe_residual", "num_experts": 4, "num_experts_per_tok": 2}
    model, ids = from_host(small_host("llama"), moe_config=fields, noise=0.3), torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for kind in ("ffn", "rmoe_residual"):
            convert_experts(model, kind)
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_residuals_alone_learn_what_a_frozen_dense_model_cannot():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 16, 16, generator=generator) / 8
    domain = torch.arange(128) % 2

    def batch():
        inputs = torch.randn(128, 16, generator=generator)
        inputs[:, 0] = 4.0 * domain - 2
        shift = torch.einsum("tij,tj->ti", maps[domain], inputs)
        return inputs, inputs + dense(dense_state(), inputs) + shift

    layer = residual_layer(noise_std=0.01)
    inputs, targets = batch()
    before = nn.functional.mse_loss(inputs + dense(dense_state(), inputs), targets).item()
    core = {name: p for name, p in layer.experts.named_parameters() if name.startswith("core_")}
    kept = {name: p.requires_grad_(False).clone() for name, p in core.items()}
    assert fitted(layer, batch, 300) < 0.5 * before
    assert all(torch.equal(p, kept[name]) for name, p in core.items())
    for name in layer.experts.stack_names:
        ratio = getattr(layer.experts, f"residual_{name}").flatten(1).norm(dim=1) / core[f"core_{name}"].norm()
        assert ratio.mean() < 0.5
