"""SpeechMoE: an embedding of every token that the routers of all layers read."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


def build(**options):
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    router = {"name": "speechmoe", "route_embedding_dim": 8, "embedding_classes": 64, **options}
    losses = {"embedding": {"name": "signal", "signal": "embedding_loss", "coef": 1.0}}
    moe = {"router": router, "num_experts_per_tok": 1, "objectives": losses}
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe, initializer_range=0.5))


IDS = torch.arange(4, 24).view(2, 10)
LABELS = IDS.masked_fill(torch.arange(10) < torch.tensor([[3], [6]]), -100)


def test_every_layer_reads_the_embedding_of_the_first():
    model = build()
    output = model(input_ids=IDS, labels=LABELS, output_routing=True)
    (network,) = model.base_model.shared_routing.values()
    _, embedding = output.routing.carry["route_embedding"]
    for layer, decision in output.routing.decisions.items():
        torch.testing.assert_close(decision.expert_weight[:, 0], decision.router_probs.amax(-1))
        model.zero_grad()
        decision.router_logits.square().sum().backward(retain_graph=True)
        weight = model.moe_layers()[layer].router.embedding_weight
        assert network.inner.grad.any() and weight.grad.any()
        alone = decision.router_logits - embedding @ weight.T  # what zeros in the place of the embedding would give
        assert not torch.equal(alone.argmax(-1), decision.expert_index[:, 0])


def test_the_network_learns_to_tell_the_next_label():
    model = build()
    output = model(input_ids=IDS, labels=LABELS, output_routing=True)
    (network,) = model.base_model.shared_routing.values()
    _, embedding = output.routing.carry["route_embedding"]
    logits = (embedding @ network.head.T).view(2, 10, -1)[:, :-1]
    torch.testing.assert_close(output.aux_loss, F.cross_entropy(logits.flatten(0, 1), LABELS[:, 1:].flatten()))


def test_layers_of_unequal_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"one embedding network .* got \[\(16, 4, 64\), \(16, 8, 64\)\]"):
        build(route_embedding_dim={"default": 8, "2": 4})
