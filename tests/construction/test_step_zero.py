"""What `hf-moe build` vouches for: equal outputs where it says so, and no model that it has not filled."""

import pytest
import torch
from helpers.hosts.composed import composed_moe
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.construction.build import build_model


def checked(folder, system=None, **moe_config):
    checks = []
    model, _ = build_model(folder, None, system, moe_config=moe_config, on_check=checks.append)
    return model, checks[0]


@pytest.fixture
def mixtral(save_decoder):
    return save_decoder("mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("system", "moe_config"),
    [
        ("anyexperts", {"num_experts": 8, "num_experts_per_tok": 4}),  # fusion scales the tokens
        ("top_k", {"num_shared_experts": 1, "shared_expert_gate": True}),
        ("top_k", {"granularity": 2}),
        ("top_k", {"router": {"name": "top_k", "routed_scaling_factor": 2.0}}),
        ("adamoe", {"num_experts_per_tok": 1}),  # a null slot leaves the residual
    ],
)
def test_exact_is_said_only_of_equal_models(decoder_folder, system, moe_config):
    _, check = checked(decoder_folder, system, **moe_config)
    assert not check.exact and check.logit_difference > 1e-3


@pytest.mark.parametrize(
    ("system", "moe_config"),
    [
        ("top_k", {}),
        ("moiie", {}),
        ("top_k", {"num_shared_experts": 1}),
        ("top_k", {"router": {"name": "top_k", "capacity_factor": 0.5, "jitter_noise": 0.5}}),
        ("top_k", {"experts": {"name": "ffn", "dropout": 0.5}}),
        ("deepseek_v3", {"num_shared_experts": 0, "granularity": 1, "router": {"name": "deepseek_v3"}}),
    ],
)
def test_equal_models_are_called_exact_whatever_training_does(decoder_folder, system, moe_config):
    _, check = checked(decoder_folder, system, **moe_config)
    assert check.exact and check.logit_difference < 1e-4


def test_a_capacity_of_training_does_not_count_at_step_0(mixtral):
    model, check = checked(mixtral, objectives={"load_balance": 0.01})
    assert check.exact and check.logit_difference < 1e-5 and not model.training


def test_a_shared_expert_joins_an_adopted_moe_without_effect(mixtral):
    model, check = checked(mixtral, num_shared_experts=1)
    assert check.exact and check.logit_difference < 1e-5
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    ids = torch.arange(3, 12)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.moe_layers()[0].shared_expert.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "moe_config", [{"num_experts": 8}, {"granularity": 2}, {"expert_banks": {"text": {"num_experts": 4}}}]
)
def test_other_experts_than_the_adopted_ones_are_refused(mixtral, moe_config):
    with pytest.raises(ValueError, match=rf"moe_config.{next(iter(moe_config))}=.* contradicts Mixtral.* 4 experts"):
        checked(mixtral, **moe_config)


def test_fewer_slots_than_the_adopted_ones_are_not_exact(mixtral):
    _, check = checked(mixtral, num_experts_per_tok=1)
    assert not check.exact and check.logit_difference > 1e-3


def test_a_sigmoid_gate_with_a_bias_is_adopted_as_one(save_decoder):
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
    model, check = checked(save_decoder("minimax_m2", **fields))
    assert check.exact and check.logit_difference < 1e-5
    assert model.config.moe_config.router["score_function"] == "sigmoid"


def test_a_system_keeps_the_shared_branch_of_its_host(save_decoder):
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16}
    folder = save_decoder("qwen2_moe", **fields, shared_expert_intermediate_size=24)
    _, check = checked(folder)
    assert check.exact and check.logit_difference < 1e-5
    model, check = checked(folder, "deepseekmoe")
    assert check.exact and check.logit_difference < 1e-5
    assert model.moe_layers()[0].shared_expert.shared_expert_gate is not None
    with pytest.raises(ValueError, match=r"moe_config.num_shared_experts=0 contradicts Qwen2Moe"):
        checked(folder, num_shared_experts=0)


def test_a_block_that_computes_something_else_is_refused():
    """Its tensors look like those of a softmax gate; only its output tells."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("mixtral", **sizes, num_attention_heads=4, num_key_value_heads=2)
    dense = AutoModelForCausalLM.from_config(config).eval()
    gate = dense.model.layers[1].mlp.gate
    plain = type(gate).forward

    class SharpGate(type(gate)):
        def forward(self, hidden_states):
            return plain(self, 3 * hidden_states)

    gate.__class__ = SharpGate
    torch.nn.init.normal_(gate.weight)
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock cannot be adopted: .* of layer 1 differs"):
        composed_moe(dense)
