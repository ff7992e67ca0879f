"""RMoE: a recurrent state that runs through the routers of a token, from layer to layer."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.routing_context import RoutingContext


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
IDS = torch.arange(4, 24).view(2, 10)


def build(**options):
    torch.manual_seed(0)
    router = {"name": "rmoe_layerwise", "router_state_dim": 8, **options}
    config = HfMoeConfig(text_config=LlamaConfig(**TEXT, pad_token_id=0), moe_config={"router": router})
    config.initializer_range = 0.5
    return HfMoeForConditionalGeneration(config)


def chain(model, hidden):
    """Run the routers alone, on fixed hidden states; return the decisions of all layers."""
    context = RoutingContext.all_text(hidden[None])
    context.shared = dict(model.base_model.shared_routing.items())
    return [layer.router(hidden, context) for layer in model.moe_layers().values()]


@pytest.mark.parametrize(("options", "linked"), [({}, True), ({"detach_router_state": True}, False)])
def test_the_last_layer_reads_what_the_first_has_seen(options, linked):
    model = build(**options)
    chain(model, torch.randn(6, 16))[-1].router_logits.square().sum().backward()
    gradient = model.moe_layers()[0].router.projection.grad
    assert (gradient is not None and bool(gradient.any())) is linked


@torch.no_grad()
@pytest.mark.parametrize(("kind", "twin"), [("gru", nn.GRUCell), ("rnn", nn.RNNCell)])
def test_the_one_cell_is_that_of_torch(kind, twin):
    model, hidden = build(router_cell=kind), torch.randn(6, 16)
    (cell,) = model.base_model.shared_routing.values()
    twin, state = twin(8, 8), torch.zeros(6, 8)
    ours = (cell.input_weight, cell.state_weight, cell.input_bias, cell.state_bias)
    twin.load_state_dict(dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ours, strict=True)))
    for layer, decision in zip(model.moe_layers().values(), chain(model, hidden), strict=True):
        state = twin(hidden @ layer.router.projection.T, state)
        torch.testing.assert_close(decision.router_logits, state @ layer.router.scorer.T)


@torch.no_grad()
def test_a_closed_gate_keeps_the_zero_state():
    model = build()
    (cell,) = model.base_model.shared_routing.values()
    cell.input_bias[8:16] = 1e4  # z = 1
    logits = model(input_ids=IDS, output_routing=True).routing.decisions[3].router_logits
    assert torch.equal(logits, torch.zeros_like(logits))


def test_layers_of_unequal_cells_are_refused():
    with pytest.raises(ValueError, match=r"one router_state_dim .* got \[\(8, 'gru'\), \(8, 'rnn'\)\]"):
        build(router_cell={"default": "gru", "2": "rnn"})
