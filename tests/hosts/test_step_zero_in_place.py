"""A host that is made a MoE in place computes what it computed before, with all its modalities."""

import inspect

import pytest
import torch
from helpers.hosts.catalogue import ADOPTED, ALL, DENSE, HOSTS, drift_apart, in_place, labels_of
from helpers.near import assert_near
from torch.nn import functional as F

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.construction.conversion import convert_router


def real_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", ALL)
def test_a_host_in_place_has_its_own_logits(name):
    host, native = HOSTS[name], HOSTS[name].build()
    ours = in_place(name, {} if host.adopted else {"num_experts": 2 + ALL.index(name) % 3})
    assert isinstance(ours, HfMoeForConditionalGeneration) and isinstance(ours, type(native))
    assert ours.moe_layers()
    expected = real_logits(native, host.inputs())
    assert_near(real_logits(ours, host.inputs()), expected, 1e-6)
    assert (real_logits(drift_apart(ours), host.inputs()) - expected).abs().max() > 1e-2, "its experts are not used"


@pytest.mark.parametrize("name", DENSE[::4])
def test_its_loss_is_that_of_its_logits(name):
    model, inputs = in_place(name, {"objectives": {"load_balance": 0.1}}), HOSTS[name].inputs()
    labels = labels_of(inputs)
    outputs = model(**inputs, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert outputs.aux_loss > 0.05
    assert_near(outputs.loss, expected + outputs.aux_loss)


# Llama 4's gate weighs what its one expert sees, which is refused.
@pytest.mark.parametrize("name", [name for name in ADOPTED if name != "llama4"])
def test_an_adopted_host_becomes_elastic_with_equal_logits(name):
    model, inputs = in_place(name), HOSTS[name].inputs()
    convert_router(model, "anyexperts")
    assert {type(layer.router).__name__ for layer in model.moe_layers().values()} == {"AnyExpertsRouter"}
    assert_near(real_logits(model, inputs), real_logits(HOSTS[name].build(), inputs), 1e-6)


def test_all_adopted_hosts_are_listed():
    assert set(ADOPTED) == {name for name in ALL if "moe" in name or name in ("aria", "llama4")}


@pytest.mark.parametrize("name", DENSE[::5])
def test_noise_sets_experts_apart(name):
    inputs = HOSTS[name].inputs()
    quiet, noisy = (real_logits(in_place(name, noise=noise), inputs) for noise in (0.0, 0.1))
    assert (noisy - quiet).abs().max() > 1e-3


def test_a_system_gives_routers_and_objectives():
    model = in_place("qwen2_5_vl", {}, system="moiie")
    assert model.config.system == "moiie"
    assert {type(layer.router).__name__ for layer in model.moe_layers().values()} == {"MoIIERouter"}
    assert list(model.config.moe_config.objectives) == ["load_balance"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "qwen2_audio"])
def test_a_folder_gives_the_same_model_as_the_loaded_host(name, tmp_path):
    HOSTS[name].build().save_pretrained(tmp_path)
    moe_config = {"num_experts": 3, "num_experts_per_tok": 2}
    found = HfMoeForConditionalGeneration.from_host(tmp_path, moe_config=moe_config).state_dict()
    expected = in_place(name, moe_config).state_dict()
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []


def test_its_arguments_are_those_of_the_host():
    parameters = set(inspect.signature(in_place("qwen2_5_vl").forward).parameters)
    assert {"pixel_values", "image_grid_thw", "second_per_grid_ts", "output_routing", "condition_ids"} <= parameters
