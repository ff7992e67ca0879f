"""What the two configs refuse, derive and own."""

import copy
from functools import partial

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, MixtralConfig

from hf_moe import HfMoeConfig, MoeConfig
from hf_moe.configuration.layer_maps import at_layer


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4}


def host(**fields) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "vocab_size": 64, **fields})


def tower() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0},
        {"num_experts": {"default": 8, "1": 0}},
        {"num_experts": 2.5},
        {"num_experts": True},
        {"num_experts": {}},
        {"num_experts": {"one": 8}},
        {"num_experts_per_tok": -1},
        {"num_shared_experts": -1},
        {"granularity": 0},
        {"expert_intermediate_size": 0},
        {"shared_intermediate_size": 0, "num_shared_experts": 1},
        {"shared_expert_gate": "yes"},
        {"layers": "every_8"},
        {"layers": "from_4"},
        {"layers": "every_²"},
        {"layers": [0, 4]},
        {"layers": [-1]},
        {"layers": None},
        {"layers": [True]},
        {"expert_banks": {}},
        {"expert_banks": {"text": {"num_experts": 4, "width": 8}}},
        {"expert_banks": {"text": {"intermediate_size": 8}}},
        {"expert_banks": {"text": {"num_experts": 0}}},
        {"expert_banks": {"text": 4}},
        {"expert_banks": {"a.b": {"num_experts": 4}}},
        {"expert_banks": {"text": {"num_experts": 4}}, "num_experts": 8},
        {"shared_intermediate_size": 64},
        {"router": {}},
        {"router": {"name": 3}},
        {"experts": 3},
        {"objectives": {"load_balance": "strong"}},
        {"objectives": {"load_balance": float("nan")}},
        {"objectives": {"load_balance": -0.1}},
        {"objectives": {"load_balance": {"scope": "batch"}}},
        {"objectives": {"a.b": {"name": "load_balance", "coef": 0.1}}},
        {"objectives": [0.1]},
        {"expert_bank": {}},
    ],
    ids=str,
)
def test_nonsense_in_moe_config_is_refused_by_its_field(fields):
    with pytest.raises(ValueError, match="expert_bank" if "expert_bank" in fields else next(iter(fields))):
        HfMoeConfig(text_config=host(), moe_config=fields)


NOT_BY_LAYER = ("layers", "objectives", "token_balanced_loss", "attention_blocks")


@pytest.mark.parametrize("name", [name for name in MoeConfig.__annotations__ if name not in NOT_BY_LAYER])
def test_layers_that_do_not_exist_are_refused_in_any_map(name):
    usual = getattr(MoeConfig(num_experts=8, num_experts_per_tok=2), name)
    with pytest.raises(ValueError, match=rf"moe_config.{name} names the layers \['4'\]"):
        HfMoeConfig(text_config=host(), moe_config={name: {"default": usual, "4": usual}})


def test_layers_that_do_not_exist_are_refused_in_an_option():
    router = {"name": "top_k", "capacity_factor": {"default": 1.0, "4": 2.0}}
    with pytest.raises(ValueError, match=r"moe_config.router names the layers \['4'\]"):
        HfMoeConfig(text_config=host(), moe_config={"router": router})


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_confg": {}},
        {"text_config": 3},
        {"vision_config": []},
        {"moe_config": [8]},
        {"connector": {}},
        {"connector": 3},
        {"image_token_id": -1},
        {"image_token_id": 1.5},
        {"image_token_id": 3, "video_token_id": 3},
        {"image_seq_length": 0},
        {"vision_feature_layer": "last"},
        {"vision_feature_size": 0},
        {"vision_prefix_tokens": -1},
        {"image_size": 0},
        {"initializer_range": -0.1},
        {"initializer_range": float("nan")},
        {"initializer_range": float("inf")},
        {"output_router_logits": "no"},
        {"config_format": 0},
        {"config_format": 99},
        {"dtype": "float31"},
        {"auto_map": "mine"},
        {"num_experts_per_tok": 1},
        {"hidden_size": 32},
    ],
    ids=str,
)
def test_nonsense_beside_moe_config_is_refused_by_its_field(fields):
    # `config_format` is named in words.
    name = next(iter(fields)).replace("_format", ".format")
    with pytest.raises(ValueError, match=name):
        HfMoeConfig(**{"text_config": host(), **fields})


def test_a_tower_needs_a_placeholder():
    with pytest.raises(ValueError, match="image_token_id"):
        HfMoeConfig(text_config=host(), vision_config=tower())


def test_a_field_is_checked_when_it_is_set_later_too():
    config = HfMoeConfig(text_config=host())
    with pytest.raises(StrictDataclassFieldValidationError, match="num_experts"):
        config.moe_config.num_experts = 0


def test_a_string_that_spells_a_number_is_that_number():
    objectives = {"router_z": "1e-3", "load_balance": {"coef": "1e-2"}}
    moe = {"num_experts": "8", "granularity": {"default": "2"}, "objectives": objectives}
    config = HfMoeConfig(text_config=host(), initializer_range="1e-3", moe_config=moe)
    assert config.initializer_range == 1e-3
    assert (config.moe_config.num_experts, config.moe_config.granularity) == (8, {"default": 2})


def test_what_trainers_and_tools_write_into_configs_opens():
    written = {"use_cache": False, "pad_token_id": 0, "num_labels": 2, "_attn_implementation_internal": "sdpa"}
    HfMoeConfig(text_config=host(), **written)


def test_a_saved_config_opens_whatever_a_tool_has_added(tmp_path):
    config = HfMoeConfig(text_config=host())
    config.unsloth_version = "1.2"
    config.save_pretrained(tmp_path)
    assert HfMoeConfig.from_pretrained(tmp_path).unsloth_version == "1.2"


@pytest.mark.parametrize("auto", [False, True])
def test_overrides_of_a_saved_config_are_fields_of_it(auto, tmp_path):
    load = partial(AutoConfig.from_pretrained, trust_remote_code=True) if auto else HfMoeConfig.from_pretrained
    HfMoeConfig(text_config=host(), moe_config={"num_experts": 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"moe_config\.num_experts_per_tok"):
        load(tmp_path, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="Did you mean 'moe_config'"):
        load(tmp_path, moe_confg={"num_experts_per_tok": 1})
    config = load(tmp_path, moe_config={"num_experts_per_tok": 1})
    assert (config.moe_config.num_experts, config.moe_config.num_experts_per_tok) == (4, 1)
    assert config.text_config.num_experts_per_tok == 1


def arguments() -> dict:
    """Return one value for every argument of a config that may be changed in place."""
    bank = {"num_experts": {"default": 2, "3": 3}, "intermediate_size": 8}
    moe = {
        "layers": [1, 3],
        "num_experts_per_tok": {"default": 1, "3": 2},
        "expert_banks": {"text": bank, "vision": dict(bank)},
        "router": {"name": "ernie45_vl", "boundary_token_ids": [3, 4]},
        "experts": {"name": "ffn", "dropout": {"default": 0.1}},
        "objectives": {"balance": {"name": "load_balance", "coef": 0.1}},
    }
    return {
        "text_config": host(),
        "vision_config": tower(),
        "moe_config": moe,
        "connector": {"name": "mlp", "num_layers": 1},
        "image_token_id": 5,
        "auto_map": {"AutoModel": "mine.Mine"},
        "id2label": {0: "a"},
        "architectures": ["Mine"],
    }


def as_dicts(values: dict) -> dict:
    return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}


def as_configs(values: dict) -> dict:
    return {**values, "moe_config": MoeConfig(**values["moe_config"])}


def mutables(value, seen: dict) -> dict:
    """Return the id of every object within a value that may be changed in place."""
    if isinstance(value, dict | list) or hasattr(value, "to_dict"):
        seen[id(value)] = value
        items = (
            vars(value).values() if hasattr(value, "to_dict") else value.values() if isinstance(value, dict) else value
        )
        for item in items:
            mutables(item, seen)
    return seen


@pytest.mark.parametrize("form", [dict, as_dicts, as_configs], ids=["mixed", "dicts", "configs"])
def test_configs_share_nothing_with_what_they_are_given(form):
    given = form(arguments())
    before = copy.deepcopy(given)
    first, second = HfMoeConfig(**given), HfMoeConfig(**given)
    assert as_dicts(given) == as_dicts(before)
    parts = [mutables(item, {}) for item in (given, first, second)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not [parts[one][key] for key in set(parts[one]) & set(parts[other])]
    assert second.to_dict() == first.to_dict()


def test_a_decoder_config_serves_two_models():
    text = host()
    HfMoeConfig(text_config=text, moe_config={"num_experts": 16, "num_experts_per_tok": 4})
    config = HfMoeConfig(text_config=text)
    assert (config.moe_config.num_experts, config.moe_config.num_experts_per_tok) == (8, 2)


def test_defaults_are_not_shared_between_configs():
    first, second = HfMoeConfig(), HfMoeConfig()
    first.moe_config.router["norm_topk_prob"] = False
    first.connector["num_layers"] = 3
    assert second.moe_config.router == {"name": "top_k"} and second.connector == {"name": "mlp"}


@pytest.mark.parametrize("given", [{"num_experts": 12}, MoeConfig(num_experts=12)], ids=["dict", "config"])
def test_a_preset_takes_overrides_in_both_forms(given):
    config = HfMoeConfig.from_system("moiie", text_config=host(), moe_config=given)
    assert config.moe_config.num_experts == 12
    assert config.moe_config.router == HfMoeConfig.from_system("moiie", text_config=host()).moe_config.router


def test_the_last_layers_have_names():
    moe = {
        "num_experts": {"default": 2, "last_1": 6, "last_3": 4, "1": 8},
        "router": {
            "default": {"name": "top_k"},
            "last_9": {"name": "top_k", "capacity_factor": {"default": 1.0, "last_2": 2.0}},
        },
        "expert_banks": {"last_1": {"a": {"num_experts": 2}, "b": {"num_experts": 4}}, "default": None},
    }
    config = HfMoeConfig(text_config=host(), moe_config=moe).moe_config
    assert [at_layer(config.num_experts, layer) for layer in range(4)] == [2, 8, 4, 6]
    assert [at_layer(config.router, layer)["capacity_factor"] for layer in range(4)] == [1.0, 1.0, 2.0, 2.0]
    assert [bool(at_layer(config.expert_banks, layer)) for layer in range(4)] == [False, False, False, True]


def test_banks_may_differ_between_layers():
    banks = {"default": {"a": {"num_experts": 2}, "b": {"num_experts": 2}}, "1": {"a": {"num_experts": 3}}}
    config = HfMoeConfig(text_config=host(), moe_config={"expert_banks": banks})
    assert config.moe_config.num_experts == {"default": 4, "1": 3}
    banks["1"]["a"]["num_experts"] = {"default": 5, "3": 6}
    assert HfMoeConfig(text_config=host(), moe_config={"expert_banks": banks}).moe_config.num_experts["1"] == 5


def test_a_moe_host_keeps_the_numbers_of_its_own_layers():
    mixtral = MixtralConfig(**SIZES, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    config = HfMoeConfig(text_config=mixtral, moe_config={"num_experts": 8, "layers": [1]})
    assert (config.text_config.num_local_experts, config.moe_config.num_experts) == (4, 8)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("last_1", [3]), ("last_3", [1, 2, 3]), ("last_9", [0, 1, 2, 3]), ("except_last_3", [0]), ("except_last_9", [0])],
)
def test_layers_are_counted_from_the_end(layers, expected):
    assert MoeConfig(layers=layers).moe_layers(4) == expected
