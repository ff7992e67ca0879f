"""Adoption of MoE decoders: routers and experts are taken over, logits stay."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.adoption import adopt
from hf_moe.construction.upcycling import check_host_logits, logit_difference, upcycle


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HOSTS = {
    "mixtral": ("mixtral", {"num_local_experts": 4}, [0, 1, 2, 3]),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}, [0, 1, 2, 3]),
    "qwen3_moe_normalised": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
        [0, 1, 2, 3],
    ),
    "qwen3_moe_partly_dense": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        [1],
    ),
    "olmoe": ("olmoe", {"num_experts": 4}, [0, 1, 2, 3]),
    "olmoe_normalised": ("olmoe", {"num_experts": 4, "norm_topk_prob": True}, [0, 1, 2, 3]),
}


def moe_decoder(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_experts_per_tok": 2, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def model_of(dense, moe_config):
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=dense.config.to_dict(), moe_config=moe_config))


@pytest.mark.parametrize("host", HOSTS)
def test_adopted_decoder_keeps_its_logits(host):
    model_type, fields, layers = HOSTS[host]
    dense = moe_decoder(model_type, **fields)
    moe_config, copy = adopt(dense)
    assert moe_config["layers"] == layers
    model = model_of(dense, moe_config)
    assert logit_difference(model, dense) > 1e-2
    copy(model)
    assert logit_difference(model, dense) < 1e-5
    check_host_logits(model, dense)


def test_normalisation_is_told_apart():
    configs = [adopt(moe_decoder("olmoe", num_experts=4, norm_topk_prob=norm))[0] for norm in (True, False)]
    assert [config["router"]["norm_topk_prob"] for config in configs] == [True, False]
    dense = moe_decoder("olmoe", num_experts=4, norm_topk_prob=True)
    with pytest.raises(ValueError, match="OlmoeSparseMoeBlock cannot be adopted: .* differs from it by"):
        adopt(dense)[1](model_of(dense, configs[1]))


def test_a_block_with_shared_experts_is_refused():
    dense = moe_decoder("qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    with pytest.raises(ValueError, match=r"cannot be adopted: the MoE block of layer 0 holds .*shared_expert"):
        adopt(dense)


def test_one_renormalised_slot_is_refused():
    with pytest.raises(ValueError, match="one slot per token"):
        adopt(moe_decoder("mixtral", num_local_experts=4, num_experts_per_tok=1))


def test_a_dense_decoder_is_sent_to_upcycling_and_a_moe_to_adoption():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer to adopt: upcycle it"):
        adopt(moe_decoder("llama"))
    dense = moe_decoder("mixtral", num_local_experts=4)
    with pytest.raises(ValueError, match=r"is a MoE already: use adopt\(\)"):
        upcycle(model_of(dense, {}), dense)
