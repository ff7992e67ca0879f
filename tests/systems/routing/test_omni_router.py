"""Omni-router: one gate for all layers, which the model holds."""

import pytest
import torch
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
IDS = torch.arange(4, 24).view(2, 10)


def build(router, **moe):
    torch.manual_seed(0)
    text = LlamaConfig(**TEXT, pad_token_id=0, initializer_range=0.3)
    config = HfMoeConfig(text_config=text, moe_config={"num_experts": 4, "router": router, **moe})
    return HfMoeForConditionalGeneration(config)


def gate_of(model):
    (gate,) = [tensor for name, tensor in model.named_parameters() if "shared_routing" in name]
    return gate


@torch.no_grad()
def test_one_tensor_routes_every_layer(tmp_path):
    build("omni_router").save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    before = model(input_ids=IDS, output_routing=True).routing.decisions
    gate_of(model).copy_(gate_of(model).flip(0))
    after = model(input_ids=IDS, output_routing=True).routing.decisions
    # What reaches the first layer is the same, and the others see that their experts have changed places.
    assert torch.equal(after[0].router_logits, before[0].router_logits.flip(-1))
    assert all(not torch.equal(after[layer].expert_index, before[layer].expert_index) for layer in before)


def test_its_gradient_is_the_sum_over_untied_gates():
    tied, untied = build("omni_router"), build("top_k")
    shared = gate_of(tied)
    rest = {name: value for name, value in tied.state_dict().items() if "shared_routing" not in name}
    untied.load_state_dict(
        rest | {f"model.language_model.layers.{layer}.mlp.gate.weight": shared for layer in range(3)}
    )
    for model in (tied, untied):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gates = [layer.gate.weight.grad for layer in untied.moe_layers().values()]
    torch.testing.assert_close(shared.grad, sum(gates), atol=1e-5, rtol=1e-5)


def test_layers_of_unequal_experts_are_refused():
    with pytest.raises(ValueError, match="one number of experts .* got .*4.*8"):
        build("omni_router", num_experts={"default": 4, "2": 8})


def test_a_layer_alone_says_what_it_misses():
    with pytest.raises(ValueError, match="'omni_router' of layer 1 is in part a module of the model"):
        build("omni_router").moe_layers()[1](torch.randn(1, 3, 16))
