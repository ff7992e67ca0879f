"""Mixture of attention heads: routed query heads over one shared key and value head."""

import pytest
import torch
from helpers.near import assert_near
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import HfMoeForConditionalGeneration, from_system
from hf_moe.training.parts import train_only


HEADS, WIDTH = 4, 8
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": WIDTH,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}


def make_model(num_experts=6, **text) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    attention = {"name": "moa_attention_heads", "num_experts": num_experts}
    config = from_system(
        "moa_attention_heads", text_config=LlamaConfig(**{**TEXT, **text}), moe_config={"attention": attention}
    )
    return HfMoeForConditionalGeneration(config).eval()


def attentions(model):
    return [layer.self_attn for layer in model.model.language_model.layers]


def make_rows():
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_all_heads_alike_are_multi_query_attention():
    """With every head chosen by a uniform router a layer is multi-query attention over E, summed and scaled by 1/E."""
    model, dense = make_model(num_experts=HEADS), LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    state = {name.replace("language_model.", ""): value for name, value in model.state_dict().items()}
    for layer, attention in enumerate(attentions(model)):
        attention.q_proj.gate.weight.zero_()
        prefix = f"model.layers.{layer}.self_attn"
        state[f"{prefix}.q_proj.weight"] = attention.q_proj.weight.flatten(0, 1)
        state[f"{prefix}.o_proj.weight"] = attention.o_proj.weight.transpose(0, 1).flatten(1) / HEADS
    dense.load_state_dict(state, strict=False)
    rows = make_rows()
    real = rows["attention_mask"].bool()
    assert_near(model(**rows).logits[real], dense(**rows).logits[real], 1e-5)


@torch.no_grad()
def test_the_cache_holds_one_head_and_decoding_is_exact():
    model, rows = make_model(), make_rows()
    found = model.generate(**rows, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert {layer.keys.shape[1] for layer in found.past_key_values.layers} == {1}
    mask = torch.cat([rows["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    expected = model(input_ids=found.sequences, attention_mask=mask).logits[:, 11:-1]
    assert_near(torch.stack(found.logits, 1), expected, 1e-5)


@torch.no_grad()
def test_cost_does_not_grow_with_the_heads_to_choose_from():
    counts = []
    for heads in (6, 12):
        model = make_model(heads)
        with FlopCounterMode(display=False) as counter:
            model(**make_rows())
        gates = sum(2 * 24 * 32 * heads for _ in attentions(model))
        counts.append(counter.get_total_flops() - gates)
    assert counts[0] == counts[1]


def test_the_router_feels_the_mass_that_it_keeps():
    """Of heads that are all alike, weights that sum to 1 would tell the router nothing."""
    model, rows = make_model(), make_rows()
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.o_proj):
            projection.weight.data[:] = projection.weight.data[:1].clone()
    logits = model.train()(**rows).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows["input_ids"].flatten()).backward()
    assert all(attention.q_proj.gate.weight.grad.abs().max() > 1e-5 for attention in attentions(model))


def test_objectives_read_the_heads():
    model, rows = make_model().train(), make_rows()
    output = model(**rows, labels=rows["input_ids"], output_routing=True)
    assert list(output.routing.decisions) == ["0.attention", "1.attention"]
    assert output.aux_loss > 0.005
    output.loss.backward()
    assert int(model.objectives.by_name["load_balance"].get_buffer("accumulated_0_attention").sum()) == 21 * HEADS


def test_its_parts_are_routers_and_experts():
    counts = train_only(make_model(), ["routers", "experts"])
    assert counts == {"routers": 2 * 6 * 32, "experts": 2 * 2 * 6 * 8 * 32}


def test_several_key_heads_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads=1"):
        make_model(num_key_value_heads=2)


def test_a_trained_host_is_refused():
    with pytest.raises(ValueError, match="does not start from a trained Linear"):
        from_system("moa_attention_heads", host=LlamaForCausalLM(LlamaConfig(**TEXT)))


def test_plans_leave_its_attention_whole():
    plan = make_model().tp_plan
    assert not [name for name in plan if "self_attn" in name]
    assert any(name.endswith("mlp.gate_proj") for name in plan)
