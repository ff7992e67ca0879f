"""Frozen experts are those that were frozen or loaded, however they are loaded and whatever is done with them next."""

import copy
import pickle

import pytest
import torch
from helpers.adapted import real_logits, stacks, step
from helpers.near import assert_near
from helpers.peft_version import transformers_takes_this_peft
from peft import PeftModel, get_peft_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters.editing import add_expert, freeze_experts
from hf_moe.adapters.layer import tuner_layers


TARGETS = ["q_proj", "down_proj"]


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig(**{"target_modules": TARGETS, **fields})).eval()


def expert(model, number):
    """Copies of one expert on all targets."""
    return [
        layer.experts["default"]
        .target.split(side, getattr(layer, f"moe_lora_{side}")["default"])[number]
        .detach()
        .clone()
        for layer in tuner_layers(model)
        for side in "AB"
    ]


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def drift(model, inputs):
    """Take one step of an optimizer with momentum and decay, and no forward behind it."""
    model.train()(**inputs).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5).step()
    model.zero_grad()
    model.eval()


def from_auto(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def from_peft(folder):
    return PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder.parent / "base"), folder, is_trainable=True
    )


def from_peft_on_meta(folder):
    base = LlamaForCausalLM.from_pretrained(folder.parent / "base")
    return PeftModel.from_pretrained(base, folder, is_trainable=True, low_cpu_mem_usage=True)


def from_load_adapter(folder):
    model = LlamaForCausalLM.from_pretrained(folder.parent / "base")
    model.load_adapter(folder, is_trainable=True)
    return model


@pytest.mark.parametrize("ranks", [4, [2, 4, 4, 8]])
@pytest.mark.parametrize("load", [from_auto, from_peft, from_peft_on_meta, from_load_adapter])
def test_the_loaded_expert_is_the_frozen_one_however_it_is_loaded(llama, text, randomise, tmp_path, load, ranks):
    llama().save_pretrained(tmp_path / "base")
    model = adapt(LlamaForCausalLM.from_pretrained(tmp_path / "base"), r=ranks)
    randomise(model)
    freeze_experts(model, [1])
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter").eval()
    assert_near(real_logits(loaded, text), real_logits(model, text), 1e-6)
    assert same(expert(loaded, 1), expert(model, 1))
    for parameter_name, parameter in loaded.named_parameters():
        parameter.requires_grad_("moe_lora_" in parameter_name)
    drift(loaded, text)
    with transformers_takes_this_peft():
        loaded.save_pretrained(tmp_path / "trained")
    again = from_peft(tmp_path / "trained")
    assert same(expert(again, 1), expert(model, 1)) and not same(expert(again, 0), expert(model, 0))


@pytest.mark.parametrize("ranks", [4, [2, 4]])
def test_a_merge_right_behind_a_step_holds_what_is_frozen(llama, text, randomise, ranks):
    model = adapt(llama(), router="constant", num_experts=2, r=ranks)
    randomise(model)
    freeze_experts(model, [1])
    frozen = expert(model, 1)
    drift(model, text)
    assert not same(expert(model, 1), frozen)
    model.merge_adapter()
    assert same(expert(model, 1), frozen)
    model.unmerge_adapter()
    expected = real_logits(model, text)
    assert_near(real_logits(model.merge_and_unload(), text), expected, 1e-5)


@pytest.mark.parametrize("edit", [lambda model: freeze_experts(model, [0, 1]), add_expert])
def test_an_edit_right_behind_a_step_holds_what_is_frozen(llama, text, randomise, edit):
    model = adapt(llama())
    randomise(model)
    freeze_experts(model, [1])
    frozen = expert(model, 1)
    drift(model, text)
    edit(model)
    assert same(expert(model, 1), frozen)


def test_loading_something_else_right_behind_a_step_holds_what_is_frozen(llama, text, randomise):
    model = adapt(llama(), frozen_experts=[1])
    frozen = expert(model, 1)
    drift(model, text)
    model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "router" in name}, strict=False
    )
    assert same(expert(model, 1), frozen)


def test_weights_of_a_functional_call_do_not_become_the_frozen_ones(llama, text, randomise):
    model = adapt(llama())
    randomise(model)
    freeze_experts(model, [1])
    frozen = expert(model, 1)
    others = {name: torch.ones_like(value) for name, value in model.named_parameters() if "moe_lora_B" in name}
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        functional_call(model, others, (), inputs)
    drift(model, text)
    real_logits(model, text)
    assert same(expert(model, 1), frozen)


def test_a_frozen_expert_stays_to_the_bit_under_decay_and_momentum(llama, text, randomise):
    model = adapt(llama(), num_experts_per_tok=4)
    randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    step(model, text, optimizer)  # momentum for all
    freeze_experts(model, [1, 3])
    frozen = [stack[[1, 3]].detach().clone() for stack in stacks(model)]
    others = [stack[[0, 2]].detach().clone() for stack in stacks(model)]
    for _ in range(2):
        for gradient in step(model, text, optimizer):
            assert not gradient[[1, 3]].any() and gradient[[0, 2]].any()
    saved = model.state_dict()
    names = [
        name for name, _ in model.named_parameters() if name.endswith(("moe_lora_A.default", "moe_lora_B.default"))
    ]
    for name, was in zip(names, frozen, strict=True):
        assert torch.equal(saved[name][[1, 3]], was)
    twin = copy.deepcopy(model)
    step(twin, text, torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1))
    real_logits(twin, text)
    for stack, was in zip(stacks(twin), frozen, strict=True):
        assert torch.equal(stack[[1, 3]], was)
    assert not any(torch.equal(stack[[0, 2]], was) for stack, was in zip(stacks(model), others, strict=True))
    freeze_experts(model, [])
    assert all(gradient[[1, 3]].any() for gradient in step(model, text, optimizer))
    assert model.peft_config["default"].frozen_experts is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_gives_frozen_experts_no_gradient_either(llama, text, again):
    model = adapt(llama(), num_experts_per_tok=4, frozen_experts=[1], init_lora_weights=False)
    real_logits(model, text)
    twin = again(model)
    for gradient in step(twin, text, torch.optim.SGD(twin.parameters(), lr=0.0)):
        assert not gradient[1].any() and gradient[0].any()


def test_weights_that_are_loaded_replace_the_frozen_ones(llama, text, randomise):
    model = adapt(llama())
    randomise(model)
    freeze_experts(model, [0])
    real_logits(model, text)
    other = {name: value + 1.0 for name, value in model.state_dict().items() if "moe_lora_B" in name}
    model.load_state_dict(other, strict=False)
    real_logits(model, text)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.items())
