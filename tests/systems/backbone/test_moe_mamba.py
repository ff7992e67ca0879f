"""MoE-Mamba: a Switch layer after every Mamba layer."""

import pytest
import torch
from helpers.caches import decode_one_by_one
from helpers.hosts.recurrent import HOSTS
from helpers.near import assert_near
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, JambaConfig, MambaConfig, MambaForCausalLM

from hf_moe import HfMoeForConditionalGeneration, from_system
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters


WIDTH = 512  # that of the paper's smaller models


def routed(name="jamba", **moe_config) -> HfMoeForConditionalGeneration:
    model = from_system("moe_mamba", host=HOSTS[name].build(), moe_config={"num_experts": 4, **moe_config})
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.gate.weight.normal_()
            layer.experts.down_proj += torch.randn_like(layer.experts.down_proj) * 0.1
    return model.eval()


def make_ids(length=14):
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(0))


def state_size(cache) -> int:
    """Return how many numbers the first layer, a Mamba layer, keeps."""
    states = [cache.layers[0].conv_states, cache.layers[0].recurrent_states]
    return sum(state.numel() for state in pytree.tree_leaves(states))


@pytest.mark.parametrize("name", ["jamba", "bamba"])
@torch.no_grad()
def test_one_expert_is_a_feed_forward_after_every_mixer(name):
    model = from_system("moe_mamba", host=HOSTS[name].build(), moe_config={"num_experts": 1})
    inputs = HOSTS[name].inputs()
    assert len(model.moe_layers()) == model.config.num_hidden_layers
    real = inputs["attention_mask"].bool()
    assert_near(model(**inputs).logits[real], HOSTS[name].build()(**inputs).logits[real], 1e-6)


@torch.no_grad()
def test_a_token_uses_as_many_parameters_as_in_plain_mamba():
    sizes = {"vocab_size": 8, "hidden_size": WIDTH, "pad_token_id": 0}
    plain = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2))
    # Its one layer has a Mamba mixer, and experts have two projections in and one out.
    text = JambaConfig(**sizes, num_hidden_layers=1, intermediate_size=2 * WIDTH, num_experts=1)
    model = HfMoeForConditionalGeneration(from_system("moe_mamba", text_config=text)).eval()
    statistics = RoutingStatistics()
    statistics.update(model(input_ids=torch.arange(8)[None], use_cache=False, output_routing=True).routing)
    active, expected = active_parameters(model, statistics)["text"], sum(p.numel() for p in plain.parameters())
    assert active == pytest.approx(expected, rel=0.05)
    assert sum(p.numel() for p in model.parameters()) > 10 * active


@pytest.mark.parametrize("name", ["jamba", "bamba"])
@torch.no_grad()
def test_decoding_with_states_is_the_whole_forward(name):
    model, ids = routed(name), make_ids()
    found, cache = decode_one_by_one(model, input_ids=ids)
    assert_near(found, model(input_ids=ids).logits, 1e-5)
    _, longer = decode_one_by_one(model, input_ids=make_ids(30))
    assert state_size(longer) == state_size(cache), "a Mamba layer keeps as much of 30 tokens as of 14"


@torch.no_grad()
def test_it_opens_with_its_code_and_generates_the_same(tmp_path):
    model, inputs = routed(), HOSTS["jamba"].inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    found, expected = (item.generate(**inputs, max_new_tokens=6, num_beams=2) for item in (loaded, model))
    assert torch.equal(found, expected)


def test_tokens_beyond_the_capacity_pass_by_in_training():
    model, ids = routed().train(), make_ids(24)
    for gate in (layer.gate for layer in model.moe_layers().values()):
        gate.weight.data[1:] = gate.weight.data[:1]  # all tokens are alike to the gate, and the first expert wins
    output = model(input_ids=ids, labels=ids, output_routing=True)
    for decision in output.routing.decisions.values():
        assert decision.expert_index.shape == (48, 1)
        assert (decision.expert_weight > 0).sum() == 2 * 24 // 4, "one expert takes its share of every row"
    assert output.objective_values["load_balance"] == pytest.approx(2.0, abs=0.05)
    assert output.aux_loss.item() == pytest.approx(0.02, abs=1e-3)


def task_loss(num_experts: int, seed: int, steps: int = 500) -> float:
    """Return the loss on 4096 facts: which token follows a pair of tokens."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 1}
    text = JambaConfig(**sizes, mamba_d_state=2, mamba_expand=1, initializer_range=0.2, use_cache=False)
    config = from_system("moe_mamba", text_config=text, moe_config={"num_experts": num_experts})
    model = HfMoeForConditionalGeneration(config).train()
    facts = torch.randint(64, (64, 64))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        ids = torch.randint(64, (64, 12))
        labels = torch.full_like(ids, -100)
        labels[:, 2:] = facts[ids[:, :-2], ids[:, 1:-1]]
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.loss - output.aux_loss).item())
    return sum(losses[-30:]) / 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_more_experts_learn_more_at_equal_cost(seed):
    assert task_loss(16, seed) < task_loss(1, seed)
