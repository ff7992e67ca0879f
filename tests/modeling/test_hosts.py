"""Hosts: a dense decoder whose feed-forwards became copies in MoE layers computes the same logits."""

import pytest
import torch
from helpers.hosts.composed import composed_moe, logit_gap
from helpers.trainer_loads import assert_trainer_reads_back
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, MambaConfig, T5Config

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEAD_DIM = {**GROUPED, "head_dim": 8, "sliding_window": 8}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}

HOSTS = {
    "llama": ("llama", GROUPED),
    "llama_tied": ("llama", {**GROUPED, **TIED}),
    "llama_mlp_bias": ("llama", {**GROUPED, "mlp_bias": True}),
    "mistral": ("mistral", HEAD_DIM),
    "qwen2": ("qwen2", GROUPED),
    "qwen2_tied": ("qwen2", {**GROUPED, **TIED}),
    "qwen3": ("qwen3", HEAD_DIM),
    "phi3": ("phi3", GROUPED),
    "gemma2": ("gemma2", {**HEAD_DIM, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", HEAD_DIM),
    "gemma3_untied_softcapped": ("gemma3_text", {**HEAD_DIM, **UNTIED, "final_logit_softcapping": 5.0}),
    "stablelm": ("stablelm", GROUPED),
    "stablelm_parallel_residual": ("stablelm", {**GROUPED, "use_parallel_residual": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_tied": ("gpt_neox", TIED),
    "gpt_neox_sequential_residual": ("gpt_neox", {"use_parallel_residual": False}),
    "olmo2": ("olmo2", GROUPED),
    "smollm3": ("smollm3", GROUPED),
    "granite_scaled_logits": ("granite", {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "cohere_scaled_logits": ("cohere", {**GROUPED, "logit_scale": 0.25}),
    "gpt2": ("gpt2", {}),
}


def dense_model(model_type, **fields):
    """Return a host with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.tie_weights()
    return model


def moe_of(dense, **moe_config):
    config = HfMoeConfig(text_config=dense.config.to_dict(), moe_config={"num_experts": 4, **moe_config})
    return HfMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize("host", HOSTS)
def test_upcycled_host_reproduces_the_dense_logits(host):
    model_type, fields = HOSTS[host]
    dense = dense_model(model_type, **fields)
    model = composed_moe(dense, {"num_experts": 4})
    assert len(model.moe_layers()) == 3
    assert logit_gap(model, dense) < 1e-5
    assert model.config.tie_word_embeddings == dense.config.tie_word_embeddings
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == dense.config.tie_word_embeddings


@pytest.mark.parametrize("host", HOSTS)
def test_trainer_reads_back_every_tensor_of_a_host(tmp_path, host):
    assert_trainer_reads_back(moe_of(dense_model(HOSTS[host][0], **HOSTS[host][1])), tmp_path)


@pytest.mark.parametrize("host", ["llama_mlp_bias", "phi3", "gpt_neox"])
def test_upcycled_experts_are_exact_with_shared_experts_and_wide_experts(host):
    dense = dense_model(HOSTS[host][0], **HOSTS[host][1])
    wide = {"num_experts": 4, "num_shared_experts": 2, "expert_intermediate_size": 96}
    model = composed_moe(dense, {"layers": "every_2", **wide})
    assert list(model.moe_layers()) == [1]
    assert logit_gap(model, dense) < 1e-5


def test_fine_grained_experts_are_slices_that_add_up_to_the_feed_forward():
    dense = dense_model("llama", **GROUPED, mlp_bias=True)
    model = composed_moe(dense, {"num_experts": 4, "granularity": 4, "num_experts_per_tok": 4})
    experts = model.moe_layers()[1].experts
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.gate.weight.zero_()
    assert experts.down_proj.shape == (4, 32, 12)
    # Equal weights over all slices: the whole feed-forward.
    assert logit_gap(model, dense) < 1e-5


def test_noise_makes_experts_differ_and_is_seeded():
    dense = dense_model("llama", **GROUPED)
    models = [composed_moe(dense, {"num_experts": 4}, noise=0.1, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (model.moe_layers()[0].experts.gate_up_proj for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    noise = first[0] - torch.cat(
        [dense.model.layers[0].mlp.gate_proj.weight, dense.model.layers[0].mlp.up_proj.weight]
    )
    assert noise.std().item() == pytest.approx(0.1 * 0.15, rel=0.1)


def test_a_host_whose_head_does_more_is_refused():
    dense = dense_model("llama", **GROUPED)
    head = dense.lm_head.forward
    dense.lm_head.forward = lambda hidden: head(hidden) * 1.5
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot host MoE layers: its own logits differ by"):
        composed_moe(dense)


def test_a_host_whose_feed_forward_does_more_is_refused():
    dense = dense_model("llama", **GROUPED)
    dense.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="the feed-forward of layer 1 differs"):
        composed_moe(dense)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(d_model=32, num_layers=2, vocab_size=96), "it is an encoder-decoder"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96), "no feed-forward under mlp"),
        (AutoConfig.for_model("bert", **SIZES), "no list of decoder layers under layers or h"),
        (
            AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=96),
            "it takes .'hidden_states', 'residual'",
        ),
        (
            AutoConfig.for_model("gpt_oss", **SIZES, head_dim=8, num_key_value_heads=2, num_local_experts=4),
            "not stacked as gate_up_proj",
        ),
        (
            AutoConfig.for_model("modernbert", **{**SIZES, "global_attn_every_n_layers": 1}),
            "projections .* are none of",
        ),
    ],
    ids=["t5", "mamba", "bert", "bloom", "gpt_oss", "modernbert"],
)
def test_a_host_that_cannot_be_adapted_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        HfMoeForConditionalGeneration(HfMoeConfig(text_config=config))


@pytest.mark.parametrize(
    ("host_class", "reason"),
    [
        ("LlamaForCausalLM", "config of the type 'llama', and this is one of host_type='qwen2_5_vl'"),
        ("Qwen2_5_VLModel", "no class of Transformers with a language head"),
        ("Nothing", "no class of Transformers with a language head"),
    ],
)
def test_a_class_that_is_not_of_the_host_is_refused(host_class, reason):
    with pytest.raises(ValueError, match=reason):
        HfMoeForConditionalGeneration(HfMoeConfig(host_type="qwen2_5_vl", host_class=host_class))


def test_a_host_without_a_class_takes_that_of_its_type():
    model = HfMoeForConditionalGeneration(HfMoeConfig(host_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=96))
    assert isinstance(model, GPT2LMHeadModel)
    assert model.config.host_class == "GPT2LMHeadModel"


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="PhiForCausalLM cannot host MoE layers: its own logits differ by"):
        composed_moe(dense_model("phi"))
