"""The comparison of a host's feed-forward with what takes its place sees what tensors do not tell."""

from types import SimpleNamespace

import pytest
import torch
from helpers.hosts.blocks import HIDDEN, config_of, make_block, make_layer
from torch import nn
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from hf_moe.construction.block_checks import check_block, check_expert
from hf_moe.construction.moe_blocks import read_block


def filled(name, fields=None, **block_fields):
    """Return a block, its reading with some fields changed, and the layer of that reading."""
    block, config = make_block(name, **block_fields)
    reading = read_block(block, config)
    reading.fields.update(fields or {})
    return block, reading, make_layer(block, reading, config)


@pytest.mark.parametrize(
    ("name", "experts", "part"),
    [
        ("hy_v4_vl", {"name": "ffn"}, "experts"),
        ("glm5_next", {"name": "ffn", "limit": 10.0}, "shared_experts"),
        ("glm5_next", {"name": "ffn", "limit": None, "shared_limit": 10.0}, "experts"),
        ("minimax_m3_vl", {"name": "ffn", "alpha": 1.702, "limit": 12.0, "shared_limit": 10.0}, "experts"),
    ],
    ids=["no clamp", "experts alone", "shared branch alone", "another limit"],
)
def test_a_clamp_that_small_inputs_do_not_reach_is_seen(name, experts, part):
    block, reading, layer = filled(name, {"experts": experts}, swiglu_limit=10.0)
    hidden = torch.randn(1, 8, HIDDEN)
    with torch.no_grad():
        assert (block(hidden) - layer(hidden)).abs().max() < 1e-5
    with pytest.raises(ValueError, match=f"of layer 0 differs from it by [0-9.e+-]+ in {part};"):
        check_block(layer, block, reading.branches)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("glm4v_moe", "topk_group", 4),
        ("glm4v_moe", "routed_scaling_factor", 1.0),
        ("qwen3_vl_moe", "norm_topk_prob", False),
        ("ernie4_5_vl_moe", "norm_min", 1.0),
        ("unlimited_ocr", "group_score", "best_two"),
    ],
)
def test_a_gate_with_another_option_is_refused(name, option, value):
    block, reading, _ = filled(name)
    block, reading, layer = filled(name, {"router": {**reading.fields["router"], option: value}})
    with pytest.raises(ValueError, match="differs from it by .* in the block;"):
        check_block(layer, block, reading.branches)


@pytest.mark.parametrize("bank", ["text", "vision"])
def test_every_bank_is_compared(bank):
    block, reading, layer = filled("ernie4_5_vl_moe")
    check_block(layer, block, reading.branches)
    with torch.no_grad():
        getattr(layer.experts, bank).down_proj.mul_(1.01)
    with pytest.raises(ValueError, match="differs from it by"):
        check_block(layer, block, reading.branches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_no_number_is_refused(value):
    block, reading, layer = filled("mixtral")
    with torch.no_grad():
        layer.experts.down_proj[0, 0, 0] = value
    with pytest.raises(ValueError, match="differs from it by"):
        check_block(layer, block, reading.branches)


def in_bf16(name, seed=0, **fields):
    """Return a block in bf16 with weights of `seed`, its reading, and the layer of that reading with its own gate."""
    block, config = make_block(name, **fields)
    torch.manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.15)
    block = block.bfloat16()
    reading = read_block(block, config)
    layer = make_layer(block, reading, config).bfloat16()
    layer.gate.float()
    return block, reading, layer


def test_tokens_that_rounding_sends_elsewhere_are_no_difference():
    worst = 0.0
    for seed in range(6):
        block, reading, layer = in_bf16("qwen3_vl_moe", seed, num_experts=128, num_experts_per_tok=8)
        check_block(layer, block, reading.branches)
        hidden = torch.randn(1, 128, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with torch.no_grad():
            difference = (block(hidden) - layer(hidden)).abs().max() / block(hidden).abs().max()
        worst = max(worst, difference.item())
    assert worst > 0.1


@pytest.mark.parametrize("option", [{"routed_scaling_factor": 1.2}, {"norm_topk_prob": False}])
def test_another_gate_is_a_difference_in_bf16_too(option):
    block, reading, layer = in_bf16("qwen3_vl_moe")
    check_block(layer, block, reading.branches)
    for name, value in option.items():
        setattr(layer.gate, name, value)
    with pytest.raises(ValueError, match="differs from it by .* in the block;"):
        check_block(layer, block, reading.branches)


@pytest.mark.parametrize("make", [filled, in_bf16])
@pytest.mark.parametrize("bank", [slice(0, 8), slice(8, 16)], ids=["text", "vision"])
def test_the_gate_of_every_bank_is_compared(make, bank):
    block, reading, layer = make("ernie4_5_vl_moe")
    check_block(layer, block, reading.branches)
    with torch.no_grad():
        layer.gate.weight[bank] = layer.gate.weight[bank].flip(0)
    with pytest.raises(ValueError, match="differs from it by .* in the block;"):
        check_block(layer, block, reading.branches)


def test_small_outputs_are_compared_as_closely_as_large_ones():
    block, config = make_block("qwen3_vl_moe")
    with torch.no_grad():
        block.experts.down_proj.mul_(1e-4)
    reading = read_block(block, config)
    layer = make_layer(block, reading, config)
    check_block(layer, block, reading.branches)
    layer.gate.norm_topk_prob = False
    with pytest.raises(ValueError, match="differs from it by"):
        check_block(layer, block, reading.branches)


class ClampedSiLU(nn.Module):
    def forward(self, gate):
        return nn.functional.silu(gate.clamp(max=30.0))


def dense_layer():
    """Return what the comparison of a dense feed-forward asks for: the model's config and the layer's facts."""
    block, config = make_block("mixtral")
    reading = read_block(block, config)
    return SimpleNamespace(config=config_of(reading, config)), make_layer(block, reading, config)


@pytest.mark.parametrize(("pattern", "equal"), [([0.95, 0.0], False), ([0.0, 0.0], True)])
def test_a_dense_feed_forward_that_drops_activations_is_refused(pattern, equal):
    config = Gemma3nTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        activation_sparsity_pattern=pattern,
        hidden_activation="silu",
        layer_types=["full_attention"] * 2,
    )
    torch.manual_seed(0)
    ffn = Gemma3nTextMLP(config, layer_idx=0).eval()
    model, layer = dense_layer()
    if equal:
        check_expert(model, layer, ffn)
        return
    with pytest.raises(ValueError, match="Gemma3nTextMLP cannot become a MoE layer: .* of layer 0 differs from it by"):
        check_expert(model, layer, ffn)


def test_a_dense_feed_forward_with_a_clamp_is_refused():
    block, _ = make_block("qwen2_moe")
    ffn = block.shared_expert
    model, layer = dense_layer()
    check_expert(model, layer, ffn)
    ffn.act_fn = ClampedSiLU()
    with pytest.raises(ValueError, match="Qwen2MoeMLP cannot become a MoE layer"):
        check_expert(model, layer, ffn)
