"""A host in place generates what it generated before: greedily, with beams and with a static cache."""

import pytest
import torch
from helpers.hosts.catalogue import ALL, HOSTS, fast_and_slow, in_place
from helpers.hosts.native import SPECIAL
from helpers.near import assert_near
from transformers import GenerationMixin


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
}
# A placeholder is no word that a model should write.
EXACT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": SPECIAL}
# What a text token's position is depends on the images before it, in three axes.
THREE_AXES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen2_5_omni_thinker"]


def generate(model, inputs, strategy):
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **EXACT, **strategy, **wanted)


def assert_generates_alike(ours, native, inputs, strategy):
    actual, expected = generate(ours, inputs, strategy), generate(native, inputs, strategy)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(expected.logits) == 4
    assert_near(actual.logits, expected.logits, 2e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ALL)
def test_a_host_in_place_generates_as_before(name, strategy):
    host = HOSTS[name]
    if strategy == "beams" and host.has_broken_beams:
        pytest.skip("the native model fails with beams in this release of Transformers")
    assert_generates_alike(in_place(name), host.build(), host.inputs(), STRATEGIES[strategy])


# The native Ernie 4.5-VL fails without a cache: nothing makes its type ids longer.
@pytest.mark.parametrize("name", fast_and_slow([name for name in ALL if name != "ernie4_5_vl_moe"]))
def test_generation_without_a_cache_is_the_same(name):
    host, model = HOSTS[name], in_place(name)
    kept, fresh = (generate(model, host.inputs(), {"use_cache": use_cache}) for use_cache in (True, False))
    assert torch.equal(kept.sequences, fresh.sequences)
    assert_near(kept.logits, fresh.logits, 5e-6)


@pytest.mark.parametrize("name", THREE_AXES)
def test_positions_that_are_not_prepared_do_not_go_unseen(name, monkeypatch):
    """The comparison above can fail: a class that hides how the host prepares positions generates otherwise."""
    ours, host = in_place(name), HOSTS[name]
    plain = GenerationMixin._prepare_position_ids_for_generation
    assert type(ours)._prepare_position_ids_for_generation is not plain
    monkeypatch.setattr(type(ours), "_prepare_position_ids_for_generation", plain)
    with pytest.raises(AssertionError):
        assert_generates_alike(ours, host.build(), host.inputs(), {})
