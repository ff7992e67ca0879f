"""What a host has under another name is adapted; a published system that lacks some of its targets is refused."""

import re
import warnings

import pytest
import torch
import transformers as tf
from helpers.adapted import logits
from helpers.hosts.families import HEADS, HOSTS, TEXT, words
from helpers.near import assert_near
from peft import LoraConfig, PeftModel, get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


BUILD = {
    **{name: HOSTS[name].build for name in ("llama", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "vit")},
    "gemma3": HOSTS["gemma3_text"].build,
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**HEADS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT)),
}
MOE = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE, STACKS = {"gate_proj", "up_proj", "down_proj"}, {"experts.gate_up_proj", "experts.down_proj"}
PHI = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
WHOLE = [("octavius", None), ("smora", None), ("mov_molora", "molora")]

FOUND = {
    **{(*key, "llama"): ATTENTION | DENSE for key in WHOLE},
    **{(*key, "gemma2"): ATTENTION | DENSE for key in WHOLE},
    **{(*key, host): ATTENTION | STACKS for key in WHOLE for host in MOE},
    **{(*key, "phi3"): PHI for key in WHOLE},
    **{("pill", None, host): {"input_layernorm", "post_attention_layernorm", "v_proj"} for host in ("llama", *MOE)},
    **{
        ("pill", None, host): {"input_layernorm", "pre_feedforward_layernorm", "v_proj"}
        for host in ("gemma2", "gemma3")
    },
    ("pill", "caption", "gemma3"): {"pre_feedforward_layernorm"},
    ("intuition_mor1e", None, "phi3"): PHI - {"o_proj"},
}
LACKING = {
    **{("mov_molora", "mov", host): "down_proj' is a stacked weight, which takes the experts 'lora'" for host in MOE},
    **{("intuition_mor1e", None, host): "gate_up_proj' is a stacked weight" for host in MOE},
    ("mov_molora", "mov", "phi3"): "adapts k_proj, v_proj, .* qkv_proj holds q_proj, k_proj, v_proj in one",
    ("pill", None, "phi3"): "adapts v_proj, .* qkv_proj holds",
    ("mixlora", None, "phi3"): "all of gate_proj, up_proj, down_proj of 'model.layers.0.mlp' must be",
    ("smora", None, "vit"): r"adapts down_proj, gate_proj, up_proj, .* vit\.layers\.\*\.mlp\.fc1",
    ("mov_molora", "molora", "vit"): "adapts down_proj, gate_proj, up_proj",
    ("mov_molora", "mov", "vit"): "adapts down_proj",
    ("intuition_mor1e", None, "vit"): "adapts down_proj, gate_proj, up_proj",
    ("moe_redundancy_plora", None, "llama"): r"adapts mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj",
}


def adapted(host, key, variant=None, **fields):
    torch.manual_seed(0)
    return get_peft_model(BUILD[host]().eval(), MoeLoraConfig.from_system(key, variant=variant, **fields))


def names(model):
    """Return the last part of every target's name, with `experts` in front of stacked weights."""
    keys = (key for layer in tuner_layers(model) for key in layer.key.values())
    return {re.search(r"(experts\.)?\w+$", key)[0] for key in keys}


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_a_system_finds_all_its_targets_under_the_hosts_names(case):
    system, variant, host = case
    assert names(adapted(host, system, variant)) == FOUND[case]


@pytest.mark.parametrize("case", LACKING, ids=str)
def test_a_system_that_lacks_a_target_is_refused_with_its_name(case):
    system, variant, host = case
    base = BUILD[host]()
    types = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=LACKING[case]):
        get_peft_model(base, MoeLoraConfig.from_system(system, variant=variant))
    assert [type(module) for module in base.modules()] == types


def test_a_system_without_some_of_its_targets_can_be_asked_for():
    found = adapted("vit", "smora", system=None)
    assert names(found) == ATTENTION
    assert names(adapted("vit", "smora", target_modules=["q_proj", "fc1"])) == {"q_proj", "fc1"}


LISTS = {
    "all-linear": "all-linear",
    "names": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "older names": ["q_proj", "w1", "w2", "w3"],
    "stacks": ["q_proj", "gate_up_proj", "down_proj"],
    "expression": r".*\.(q_proj|gate_proj|up_proj|down_proj)",
}


@pytest.mark.parametrize("targets", LISTS)
@pytest.mark.parametrize("host", MOE)
def test_stacked_experts_are_reached_and_trained(host, targets, randomise, tmp_path):
    torch.manual_seed(0)
    base, text = BUILD[host]().eval(), words()
    plain = logits(base, text)
    config = MoeLoraConfig(target_modules=LISTS[targets], num_experts=2, r=2)
    model = get_peft_model(base, config)
    stacks = [layer for layer in tuner_layers(model) if hasattr(layer, "parameter_name")]
    assert len(stacks) == 4 and names(model) >= STACKS | {"q_proj"}
    assert_near(logits(model, text), plain, 1e-5)
    randomise(model)
    model(**text).loss.backward()
    assert all(layer.moe_lora_B["default"].grad.any() for layer in stacks)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(BUILD[host]().eval(), tmp_path)
    assert torch.equal(logits(loaded, text), logits(model, text))


@pytest.mark.parametrize(
    ("host", "targets"),
    [("mixtral", "older names"), ("qwen3_moe", "names"), ("olmoe", "names"), ("mixtral", "all-linear")],
)
def test_stacked_experts_are_reached_where_lora_reaches_them(host, targets):
    lora = get_peft_model(BUILD[host](), LoraConfig(target_modules=LISTS[targets]))
    reached = {name for name, module in lora.named_modules() if hasattr(module, "parameter_name")}
    model = get_peft_model(BUILD[host](), MoeLoraConfig(target_modules=LISTS[targets]))
    found = {name for name, module in model.named_modules() if hasattr(module, "parameter_name")}
    assert {name for name in reached if "experts" in name} == found


@pytest.mark.parametrize("host", MOE)
def test_one_expert_on_stacks_merges_into_what_it_computed(host, randomise):
    torch.manual_seed(0)
    config = MoeLoraConfig(target_modules=LISTS["names"], num_experts=1, num_experts_per_tok=1, router="constant")
    model = get_peft_model(BUILD[host]().eval(), config)
    randomise(model)
    expected = logits(model, words())
    real = words()["attention_mask"].bool()
    found = logits(model.merge_and_unload(), words())
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], ["up_proj", "down_proj"], r".*\.(q_proj|w1)"], ids=str)
def test_half_of_a_stacked_weight_is_refused(targets):
    with pytest.raises(ValueError, match="in one weight, and of these only (gate_proj|up_proj|w1) is a target"):
        get_peft_model(BUILD["mixtral"](), MoeLoraConfig(target_modules=targets))


@pytest.mark.parametrize("targets", ["all-linear", LISTS["names"], LISTS["expression"]], ids=str)
@pytest.mark.parametrize("excluded", [["experts", "gate_proj", "up_proj", "down_proj"], r".*experts.*"], ids=str)
def test_stacked_experts_can_be_left_out(targets, excluded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoeLoraConfig(target_modules=targets, exclude_modules=excluded)
        assert not names(get_peft_model(BUILD["mixtral"](), config)) & STACKS


def test_a_target_in_a_list_that_the_model_lacks_is_warned_of():
    config = MoeLoraConfig(target_modules=["q_proj", "gate_porj"])
    with pytest.warns(UserWarning, match="nothing of the name gate_porj"):
        get_peft_model(BUILD["llama"](), config)
