"""Sparse upcycling: experts that are copies compute what the dense model does, and learn more than it."""

import pytest
import torch
from helpers.router_cases import fit, make_experts, make_hidden, make_router, make_spec, moe, text_context
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe import from_system


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("slots", [2, 8])
def test_copies_of_the_feed_forward_keep_the_logits(tmp_path, slots):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, initializer_range=0.2)).eval()
    model = from_system("sparse_upcycling", host=dense, moe_config={"num_experts_per_tok": slots})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = dense(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=0)


def test_upcycled_experts_learn_two_modalities_better_than_the_feed_forward():
    """The feed-forward and its copies go on to learn a map for each of two kinds of tokens."""
    torch.manual_seed(0)
    spec = make_spec(num_experts=4, num_experts_per_tok=2)
    maps, kinds = torch.randn(2, 32, 32) / 32**0.5, 3.0 * torch.randn(2, 32)
    context = text_context(4, 16)

    def batch():
        kind = torch.arange(64) % 2
        noise = make_hidden(context)
        return noise + kinds[kind], torch.einsum("td,tde->te", noise, maps[kind])

    dense = make_experts(make_spec(num_experts=1, num_experts_per_tok=1))
    run_dense = moe(make_router("top_k", spec=make_spec(num_experts=1, num_experts_per_tok=1)), dense, context)
    fit(run_dense, dense.parameters(), batch, 100)
    experts, router = make_experts(spec), make_router("top_k", spec=spec)
    experts.load_state_dict({name: tensor.repeat(4, 1, 1) for name, tensor in dense.state_dict().items()})
    upcycled = fit(moe(router, experts, context), nn.ModuleList([router, experts]).parameters(), batch, 300)
    assert upcycled < 0.8 * fit(run_dense, dense.parameters(), batch, 300)
