"""Kinds of attention in place of a host's: equal at first, and its positions and every cache stay its own."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.hosts.native import SPECIAL
from helpers.near import assert_near
from transformers import AutoModelForImageTextToText

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.modeling.replacement import Replacement


KINDS = {
    "experts": {"attention": {"name": "attention_experts", "num_experts": 3}},
    "shared_keys": {"attention": {"name": "attention_experts", "num_experts": 3, "share_kv": True}},
    "attentive": {
        "attention": "mae_attentive_experts",
        "router": {"name": "mlp", "gate_input": "prefix_mean", "activation": "tanh", "zero_init": True},
    },
    "parallel": {
        "attention": {"name": "attention_experts", "num_experts": 3, "share_kv": True},
        "layer": "parallel_block",
    },
}
# Those that do not start as the host does.
CHANGED = {"heads": {"attention": {"name": "uoe"}, "router": {"name": "uoe"}}}
NAMES = ("llama", "qwen3", "gemma3", "qwen2_5_vl")
EXACT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": SPECIAL}


def in_place(kind, name) -> HfMoeForConditionalGeneration:
    return HfMoeForConditionalGeneration.from_host(
        HOSTS[name].build(), moe_config={"layers": [], **{**KINDS, **CHANGED}[kind]}
    )


@torch.no_grad()
def drifted(model):
    """Move what was put into the host apart, as training does."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, Replacement):
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def generate(model, inputs, **strategy):
    return model.generate(**inputs, **EXACT, **strategy, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("name", [*NAMES, "qwen3_5"])  # in which some layers attend
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "parallel"])
def test_it_starts_as_the_host_and_leaves_it(kind, name):
    inputs, model = HOSTS[name].inputs(), in_place(kind, name)
    expected = logits_of(HOSTS[name].build(), inputs)
    assert_near(logits_of(model, inputs), expected, 2e-6)
    assert (logits_of(drifted(model), inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [*KINDS, *CHANGED])
def test_every_cache_generates_as_none_does(kind, name, strategy):
    inputs, model = HOSTS[name].inputs(), drifted(in_place(kind, name))
    expected = generate(model, inputs, **strategy, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        found = generate(model, inputs, **strategy, **cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert_near(found.logits, expected.logits, 5e-6)


@pytest.mark.parametrize("kind", [*KINDS, *CHANGED])
def test_it_is_saved_with_its_code(kind, tmp_path):
    inputs, model = HOSTS["gemma3"].inputs(), drifted(in_place(kind, "gemma3"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_a_layer_alone_has_no_router():
    layer = drifted(in_place("attentive", "llama")).model.layers[0]
    positions = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="call the whole model"):
        layer(torch.zeros(1, 4, 32), position_embeddings=positions)
