"""Residual MoE: the routed experts and a dense feed-forward, weighed by a learned softmax of two."""

import pytest
import torch
from helpers.hosts.composed import composed_moe, logit_gap
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.training.parts import train_only


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
MIXED = {"num_experts": 4, "num_shared_experts": 1, "residual_mix": True}


def mixed(**moe_config) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    config = HfMoeConfig(text_config=LlamaConfig(**SIZES), moe_config={**MIXED, **moe_config}, initializer_range=0.2)
    return HfMoeForConditionalGeneration(config).eval()


def test_the_output_is_the_mix_of_both_branches():
    layer = mixed().moe_layers()[0]
    hidden = torch.randn(2, 5, 32)
    mix, layer.residual_mix = layer.residual_mix, None
    both, shared = layer(hidden), layer.shared_expert(hidden)
    layer.residual_mix = mix
    share = mix(hidden).softmax(-1)
    expected = (both - shared) * share[..., :1] + shared * share[..., 1:]
    torch.testing.assert_close(layer(hidden), expected, atol=1e-5, rtol=1e-5)
    assert (share - 0.5).abs().max() > 0.01


def test_an_upcycled_mix_keeps_the_logits_whatever_it_weighs():
    torch.manual_seed(1)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval()
    model = composed_moe(dense, MIXED)
    torch.nn.init.normal_(model.moe_layers()[0].residual_mix.weight)
    assert logit_gap(model, dense) < 1e-5


def test_the_mix_is_trained_with_the_routers():
    model = mixed()
    train_only(model, ["routers"])
    trained = {name.partition(".mlp.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"gate.weight", "residual_mix.weight", "residual_mix.bias"}


def test_a_mix_without_a_shared_branch_is_refused():
    with pytest.raises(ValueError, match="residual_mix weighs .* set num_shared_experts"):
        mixed(num_shared_experts=0)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [("sparse", [0, 2, 4]), ("first_half", [0, 1]), ("second_half", [2, 3, 4]), ("every_2", [1, 3])],
)
def test_the_modes_of_moe_llava_name_their_layers(layers, indices):
    config = HfMoeConfig(text_config=LlamaConfig(**{**SIZES, "num_hidden_layers": 5}), moe_config={"layers": layers})
    assert config.moe_layers() == indices
