"""`torch.compile` of adapted models: what it computes, and where its graph breaks."""

import pytest
import torch
from helpers.adapted import logits
from helpers.near import assert_near
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapt(randomise, **fields):
    torch.manual_seed(0)
    host = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    model = get_peft_model(host, MoeLoraConfig(target_modules=["q_proj", "down_proj"], **fields)).eval()
    randomise(model)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def test_the_graph_breaks_at_the_root_alone(text, randomise):
    model = adapt(randomise)
    expected = logits(model, text)
    assert_near(logits(compiled(model), text), expected, 1e-6)
    reasons = counters["graph_break"]
    # Where its context is passed down, once in every frame that is tried; no layer and no target breaks it.
    assert all("hf_moe_root_context" in reason for reason in reasons), list(reasons)
    assert sum(reasons.values()) <= 4


@pytest.mark.parametrize("fields", [{"router": "sequence"}, {"router_input": "model"}], ids=str)
def test_a_layer_whose_graph_breaks_routes_as_before(fields, text, randomise):
    model = adapt(randomise, **fields)
    expected = logits(model, text)
    for layer in tuner_layers(model):
        layer.base_layer.forward = torch.compiler.disable(layer.base_layer.forward)
        for router in layer.moe_lora_router.values():
            router.forward = torch.compiler.disable(router.forward)
    for attention in (layer.self_attn for layer in model.get_base_model().model.layers):
        attention.forward = torch.compiler.disable(attention.forward)
    assert_near(logits(compiled(model), text), expected, 1e-6)
    assert sum(counters["graph_break"].values()) > 4
    assert_near(logits(model, text), expected, 1e-6)
