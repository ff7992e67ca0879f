"""MEO: one merged expert per block, at the cost of one expert."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.mechanisms import get_mechanism


SPEC = {"layer_idx": 0, "hidden_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 16}


def experts(**fields):
    torch.manual_seed(0)
    config = HfMoeConfig(text_config=LlamaConfig())
    config._experts_implementation = "eager"
    made = get_mechanism("experts", "ffn")(config, MoELayerSpec(**SPEC, **fields))
    made.initialize(0.5)
    return made


def outputs(made):
    """Return what a merged expert and the mixed outputs of the experts are, with the same gates for all tokens."""
    tokens, gates = torch.randn(6, 16), torch.tensor([0.5, 0.0, 0.2, 0.3])
    merged = made(tokens, ParameterMixture(gates[None], torch.zeros(6, dtype=torch.long), 4))
    index = torch.arange(4).expand(6, -1)
    return merged, made(tokens, ExpertAssignment(index, gates.expand(6, -1), 4))


def test_a_merged_matrix_is_the_mixture_of_outputs():
    linear = experts(hidden_act="linear", gated=False)
    linear.down_proj.data[:] = torch.eye(16)
    torch.testing.assert_close(*outputs(linear), atol=1e-5, rtol=1e-5)


def test_a_merged_feed_forward_is_another_model():
    merged, mixed = outputs(experts())
    assert (merged - mixed).abs().max() > 0.1


def build(router, **moe):
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    moe = {"layers": "all", "num_experts": 8, "router": router, **moe}
    config = HfMoeConfig(
        text_config=LlamaConfig(**text, vocab_size=64, eos_token_id=None, pad_token_id=0), moe_config=moe
    )
    config._experts_implementation = "eager"
    model = HfMoeForConditionalGeneration(config).eval()
    next(iter(model.moe_layers().values())).router.weight.data.normal_()
    for stack in next(iter(model.moe_layers().values())).experts.parameters():
        stack.data.normal_(std=0.3)
    return model


@torch.no_grad()
def flops(router, chosen):
    """Return the operations of the MoE layer on a row of 128 tokens."""
    layer = build(router, num_experts_per_tok=chosen).moe_layers()[0]
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 128, 32))
    return counter.get_total_flops()


def test_the_cost_does_not_grow_with_k():
    merged = [flops({"name": "meo", "block_size": 128}, chosen) for chosen in (1, 2, 4)]
    plain = [flops("top_k", chosen) for chosen in (1, 2, 4)]
    assert max(merged) < 1.05 * min(merged)
    assert plain[1] > 1.9 * plain[0] and plain[2] > 1.9 * plain[1]


@pytest.mark.parametrize("block_size", [4, None])
@torch.no_grad()
def test_only_whole_rows_show_a_token_the_later_ones(block_size):
    model = build({"name": "meo", "block_size": block_size})
    ids = torch.arange(3, 15)[None]
    changed = ids + torch.eye(12, dtype=torch.long)  # (12, 12): one token each
    difference = (model(changed).logits - model(ids).logits).abs().amax(-1)  # (12, 12)
    earlier = difference[torch.ones(12, 12).tril(-1).bool()]  # of tokens before the changed one
    assert earlier.max() > 1e-3 if block_size is None else (earlier == 0.0).all()


def prompts():
    """Return two rows, the first with padding before it."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids * mask, mask


# By name: what is asked of `generate`, and how many of the two rows.
WAYS = {
    "greedy": ({}, 2),
    "beams": ({"num_beams": 3}, 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, 1),
    "assisted": ({"assistant": True}, 1),
    "static": ({"cache_implementation": "static"}, 2),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_was_pooled_is_remembered_across_decoding(way):
    model, (options, rows) = build({"name": "meo", "block_size": 4}), WAYS[way]
    ids, mask = (part[:rows] for part in prompts())
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    helper = {"assistant_model": build("top_k")} if options.get("assistant") else {}
    given = {name: value for name, value in options.items() if name != "assistant"}
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    expected = model.generate(ids, use_cache=False, **common, **beams)
    assert torch.equal(model.generate(ids, **common, **given, **helper), expected)
