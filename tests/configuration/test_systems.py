import inspect

import pytest
import torch
from transformers import LlamaConfig

from hf_moe.configuration.configuration_hf_moe import HfMoeConfig, MoeConfig
from hf_moe.configuration.systems import list_systems, load_preset
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.modeling_hf_moe import HfMoeForConditionalGeneration


KEYS = [system["key"] for system in list_systems()]
PROMISED = {
    "top_k",
    "switch_transformer",
    "deepseekmoe",
    "deepseek_v3",
    "adamoe",
    "dynamic_moe_top_p",
    "ernie45_vl",
    "ming_multi_router",
    "moiie",
    "moe_llava",
}


def tiny_host(**kwargs) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "num_hidden_layers": 3, "vocab_size": 64, **kwargs})


def test_the_promised_systems_are_listed_with_what_they_set():
    systems = {system["key"]: system for system in list_systems()}
    assert PROMISED <= set(systems)
    assert set(systems["moiie"]) == {"key", "title", "arxiv", "family", "sets"}
    assert systems["moiie"]["sets"] == ["layers", "num_experts", "num_experts_per_tok", "objectives", "router"]


def test_an_unknown_system_is_refused_with_the_nearest_key():
    with pytest.raises(ValueError, match="Unknown system 'moie'.*'moiie'"):
        load_preset("moie")


def test_a_path_is_not_a_key():
    with pytest.raises(ValueError, match="Unknown system"):
        load_preset("../presets/moiie")


@pytest.mark.parametrize("key", KEYS)
def test_preset_has_its_key_and_known_fields_only(key):
    preset = load_preset(key)
    assert preset["key"] == key
    assert set(preset) == {"key", "title", "arxiv", "year", "family", "moe_config"}
    assert preset["arxiv"] is None or isinstance(preset["arxiv"], str)
    assert set(preset["moe_config"]) <= set(MoeConfig.__annotations__)


@pytest.mark.parametrize("key", KEYS)
def test_options_of_a_preset_are_those_of_its_mechanisms(key):
    moe = MoeConfig(**load_preset(key)["moe_config"])
    objectives = [
        {"name": name, **(value if isinstance(value, dict) else {"coef": value})}
        for name, value in moe.objectives.items()
    ]
    used = [("router", moe.router), ("experts", moe.experts), *(("objective", value) for value in objectives)]
    for kind, value in used:
        cls = get_mechanism(kind, value["name"])
        assert set(value) - {"name", "layer_reduction"} <= set(inspect.signature(cls).parameters), (kind, value)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("key", KEYS)
def test_preset_fits_hosts_of_any_depth(key, layers):
    config = HfMoeConfig.from_system(key, text_config=tiny_host(num_hidden_layers=layers))
    assert config.system == key
    assert config.moe_layers()
    assert config.moe_config.router == load_preset(key)["moe_config"]["router"]


def test_entries_of_moe_config_override_those_of_the_preset():
    config = HfMoeConfig.from_system("moiie", text_config=tiny_host(), moe_config={"num_experts": 8})
    assert config.moe_config.num_experts == 8
    assert config.moe_config.router["name"] == "moiie"


def test_fine_grained_preset_keeps_the_parameters_of_its_coarse_form():
    moe = MoeConfig(**load_preset("deepseekmoe")["moe_config"])
    assert (moe.num_experts + moe.num_shared_experts) % moe.granularity == 0
    assert (moe.num_experts_per_tok + moe.num_shared_experts) % moe.granularity == 0


@pytest.mark.parametrize("key", KEYS)
def test_preset_builds_a_model_that_trains(key):
    config = HfMoeConfig.from_system(key, text_config=tiny_host(num_hidden_layers=2))
    model = HfMoeForConditionalGeneration(config).train()
    input_ids = torch.arange(24).view(2, 12)
    modality = torch.zeros_like(input_ids)
    modality[:, 2:6] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        output = model(input_ids=input_ids, mm_token_type_ids=modality, labels=input_ids)
        output.loss.backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.zero_grad()
    assert set(output.objective_values) == set(config.moe_config.objectives)
    assert all(value.isfinite() for value in output.objective_values.values())
