"""Llama 3 upcycled: the order of softmax and choice decides the start, a capacity what is dropped."""

import pytest
import torch
from helpers.router_cases import collapsed, make_hidden, make_router, text_context
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import from_system
from hf_moe.configuration.systems import load_system


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize(("variant", "equal"), [("mixtral", True), ("st", False)])
def test_only_weights_that_sum_to_one_keep_the_logits(variant, equal):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, initializer_range=0.2)).eval()
    model = from_system("llama3_moe_upcycling", host=dense, variant=variant)
    with torch.no_grad():
        difference = (model(IDS).logits - dense(IDS).logits).abs().max().item()
    assert difference < 1e-5 if equal else difference > 1e-2


@pytest.mark.parametrize(("factor", "dropped"), [(None, 0), (1.0, 18), (4.0, 0)])
def test_a_capacity_drops_tokens_of_a_skewed_router(factor, dropped):
    options = load_system("llama3_moe_upcycling").fields("model", "capacity")["router"]
    options = {**options, "capacity_factor": factor}
    router = collapsed(make_router(options.pop("name"), options)).train()
    context = text_context(1, 12)
    hidden = make_hidden(context).abs()  # all tokens to expert 0, and a second choice
    assert (router(hidden, context).expert_index == 8).sum() == dropped
