"""Omni-router: one gate for all layers, which the model holds."""

import pytest
import torch
from helpers.layers import make_layer
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.routing_context import RoutingContext


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


@torch.no_grad()
def test_every_modality_may_have_a_gate_for_all_layers():
    model, types = build({"name": "omni_router", "modalities": ["text", "image"]}), torch.arange(20).view(2, 10) % 2
    before = model(input_ids=IDS, mm_token_type_ids=types, output_routing=True).routing.decisions[0]
    gate_of(model)[1].copy_(gate_of(model)[1].flip(0))
    after = model(input_ids=IDS, mm_token_type_ids=types, output_routing=True).routing.decisions[0]
    image = types.flatten() == 1
    assert torch.equal(after.router_logits[~image], before.router_logits[~image])
    assert torch.equal(after.router_logits[image], before.router_logits[image].flip(-1))
    assert torch.equal(after.gate_index, types.flatten())


def test_layers_of_unequal_experts_are_refused():
    with pytest.raises(ValueError, match=r"one number of experts.* shapes \[\(4, 16\), \(8, 16\)\]"):
        build("omni_router", num_experts={"default": 4, "2": 8})


def test_a_layer_alone_says_what_it_misses():
    with pytest.raises(ValueError, match="'omni_router' of layer 1 is in part a module of the model"):
        build("omni_router").moe_layers()[1](torch.randn(1, 3, 16))


def choices_after_training(router, seed):
    """Train three layers on four clusters of each of two modalities; return the choices (1000,) of every layer."""
    stack = nn.ModuleList(make_layer(16, 24, 4, 1, router=router, seed=10 * seed + number) for number in range(3))
    torch.manual_seed(seed)
    gate = stack[0].router.shared_part([layer.router for layer in stack])
    if gate is not None:
        gate.initialize(0.3)
    centres, maps = 2 * torch.randn(8, 16), torch.randn(8, 16, 16) / 4
    parameters = [*stack.parameters(), *(() if gate is None else gate.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(151):
        cluster = torch.randint(8, (128 if step < 150 else 1000,))
        inputs = centres[cluster] + 0.5 * torch.randn(len(cluster), 16)
        hidden, choices = inputs, []
        for layer in stack:
            context = RoutingContext.all_text(inputs[None])
            context.shared = {layer.router.shared_name: gate}
            hidden = hidden + layer.mix(F.rms_norm(hidden, (16,)), context)
            choices.append(context.decisions[1].expert_index[:, 0])
        F.mse_loss(hidden, torch.einsum("td,tdo->to", inputs, maps[cluster])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return choices


def shared_information(first, second):
    """Return the mutual information of choices among four experts, over the geometric mean of their entropies."""
    table = F.one_hot(first, 4).double().T @ F.one_hot(second, 4).double() / len(first)  # (4, 4)
    joint, one, other = (torch.special.entr(part).sum() for part in (table, table.sum(0), table.sum(1)))
    return (one + other - joint) / (one * other).sqrt().clamp(min=1e-9)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_neighbouring_layers_choose_alike_where_they_share_the_gate(seed):
    plain = {"name": "top_k", "norm_topk_prob": False}
    found = {}
    for name, router in (("shared", "omni_router"), ("separate", plain)):
        first, second, third = choices_after_training(router, seed)
        found[name] = (shared_information(first, second) + shared_information(second, third)) / 2
    assert found["shared"] > found["separate"] + 0.1
