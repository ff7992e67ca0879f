"""Conversion to AnyExperts: the same outputs at step 0, from every kind of model with a top-k gate."""

import pytest
import torch
from helpers.hosts.composed import composed_moe, logit_gap
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.conversion import convert_experts, convert_router, set_objectives
from hf_moe.modeling.context import routers_of


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HOSTS = {
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8}),
    "qwen3_moe_normalised": (
        "qwen3_moe",
        {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", {"num_experts": 8}),
}


def decoder(model_type: str, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def model_of(dense, moe_config) -> HfMoeForConditionalGeneration:
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=dense.config.to_dict(), moe_config=moe_config))


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("host", HOSTS)
def test_an_adopted_moe_keeps_its_logits_as_anyexperts(host, slots):
    model_type, fields = HOSTS[host]
    original = decoder(model_type, num_experts_per_tok=slots, **fields)
    model = composed_moe(original)
    normalised = model.moe_layers()[0].router.norm_topk_prob
    convert_router(model, "anyexperts", max_slots=6)
    assert logit_gap(model, original) < 1e-5
    options = model.config.moe_config.router
    assert options["name"] == "anyexperts"
    assert options["normalise"] == ("filled" if normalised else "none")


def test_an_upcycled_dense_decoder_keeps_its_logits_as_anyexperts(tmp_path):
    dense = decoder("llama")
    model = composed_moe(dense, {"num_experts": 8, "num_experts_per_tok": 4})
    convert_router(model, "anyexperts")
    set_objectives(model, {"load_balance": 0.001, "slot_budget": 1.0})
    assert logit_gap(model, dense) < 1e-5
    model.save_pretrained(tmp_path)
    assert logit_gap(HfMoeForConditionalGeneration.from_pretrained(tmp_path), dense) < 1e-5


def test_a_converted_model_learns_its_allocation():
    dense = decoder("llama")
    model = model_of(dense, {"num_experts": 8, "num_experts_per_tok": 4})
    convert_router(model, "anyexperts")
    set_objectives(model, {"slot_budget": 1.0})
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gate = model.moe_layers()[0].router
    for name in ("importance_out", "alpha", "weight", "virtual_bias"):
        gradient = getattr(gate, name).grad if hasattr(gate, name) else None
        assert gradient is None or gradient.isfinite().all(), name
    assert gate.importance_out.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("moe_config", "message"),
    [
        ({"num_experts_per_tok": 1}, "1 < num_experts_per_tok.* Convert to 'top_k', which can"),
        ({"router": "moiie"}, "MoIIERouter, which is more than one top-k gate"),
    ],
)
def test_a_router_that_anyexperts_cannot_start_as_is_refused(moe_config, message):
    text = LlamaConfig(**SIZES)
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config={"num_experts": 4, **moe_config}))
    with pytest.raises(ValueError, match=message):
        convert_router(model, "anyexperts")


def test_another_router_takes_over_what_fits_and_leaves_the_experts():
    text = LlamaConfig(**SIZES)
    moe_config = {"num_experts": 4, "num_experts_per_tok": 1, "objectives": {"load_balance": 0.1}}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe_config))
    experts = model.moe_layers()[0].experts.down_proj.clone()
    convert_router(model, "evomoe_dtr", bottleneck_rank=4)
    assert model.config.moe_config.router == {"name": "evomoe_dtr", "bottleneck_rank": 4}
    assert torch.equal(model.moe_layers()[0].experts.down_proj, experts)
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_an_unknown_objective_leaves_the_old_ones():
    text = LlamaConfig(**SIZES)
    model = HfMoeForConditionalGeneration(
        HfMoeConfig(text_config=text, moe_config={"num_experts": 4, "objectives": {"load_balance": 0.1}})
    )
    with pytest.raises(ValueError, match="Unknown objective"):
        set_objectives(model, {"load_balanse": 0.1})
    assert list(model.objectives.by_name) == ["load_balance"]
    assert model.config.moe_config.objectives == {"load_balance": 0.1}
    set_objectives(model, {})
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert model(input_ids=ids, labels=ids).aux_loss == 0


@pytest.mark.parametrize("block", ["cartesian_moe", "chain_of_experts", "mh_moe", "moore", "smoe_stratified"])
def test_routers_and_experts_of_a_block_are_converted(block):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "block": block}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**SIZES), moe_config=moe)).eval()
    ids = torch.arange(2, 12)[None]
    before = model(input_ids=ids).logits
    convert_router(model, "top_k", bias_update_rate=0.1)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert all(router.e_score_correction_bias is not None for router in routers_of(model).values())
    convert_experts(model, "ffn", dropout=0.1)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_router_that_all_layers_share_brings_its_part():
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**SIZES), moe_config=moe)).eval()
    convert_router(model, "omni_router")
    assert list(model.base_model.shared_routing) == ["omni_router"]
    assert model(input_ids=torch.arange(2, 12)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("width", "kept"), [(8, True), (4, False)])
def test_a_shared_part_is_kept_where_it_fits(width, kept):
    moe = {"num_experts": 4, "router": {"name": "rmoe_layerwise", "router_state_dim": 8}}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=LlamaConfig(**SIZES), moe_config=moe))
    before = model.base_model.shared_routing["rmoe_layerwise"].state_weight
    convert_router(model, "rmoe_layerwise", router_state_dim=width)
    after = model.base_model.shared_routing["rmoe_layerwise"].state_weight
    assert torch.equal(after, before) if kept else after.shape == (3 * width, width)
