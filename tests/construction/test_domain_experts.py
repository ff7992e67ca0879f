"""A MoE of models that were trained apart, and one more of them later."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from helpers.router_cases import text_context

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.construction.domain_experts import add_expert, from_dense_experts


IDS = torch.arange(4, 24).view(2, 10)


@torch.no_grad()
def test_experts_are_the_models_feed_forwards_and_the_rest_is_their_mean(tmp_path):
    seed, *copies = (small_host("llama", seed=number) for number in range(4))
    domains = torch.randn(3, 5)
    model = from_dense_experts(seed, copies[:2], domains[:2], objectives={"load_balance": 0.01})
    before = [parameter.shape for parameter in model.moe_layers()[0].gate.parameters()]
    add_expert(model, copies[2], domains[2])
    assert [parameter.shape for parameter in model.moe_layers()[0].gate.parameters()] == before
    layer, path, hidden = model.moe_layers()[1], "model.layers.1.mlp", torch.randn(1, 6, 32)
    assert torch.equal(layer.router.domain_embeddings, domains)
    decision, expected = layer.router(hidden[0], text_context(1, 6)), seed.get_submodule(path)(hidden)
    for expert, copy in enumerate(copies):
        share = (decision.expert_weight * (decision.expert_index == expert)).sum(-1)
        expected = expected + share[None, :, None] * copy.get_submodule(path)(hidden)
    assert_near(layer(hidden), expected, 1e-5)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert_near(model.get_parameter(query), sum(copy.get_parameter(query) for copy in copies) / 3)
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert_near(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert loaded(input_ids=IDS, labels=IDS).aux_loss > 0


def test_what_does_not_fit_is_refused():
    seed, copy = small_host("llama"), small_host("llama", seed=1)
    with pytest.raises(ValueError, match="1 experts and 2 domain embeddings"):
        from_dense_experts(seed, [copy], torch.randn(2, 5))
    model = from_dense_experts(seed, [copy, copy], torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"shape \(5,\), and the new one is of shape \(4,\)"):
        add_expert(model, copy, torch.randn(4))
    plain = HfMoeForConditionalGeneration.from_host(seed, moe_config={"num_experts": 2})
    with pytest.raises(ValueError, match="has the router TopKRouter"):
        add_expert(plain, copy, torch.randn(4))
