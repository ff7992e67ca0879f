"""Models whose modules carry Accelerate's hooks, as after `device_map="auto"` and offloading."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model

from hf_moe import MoeLoraConfig


FIELDS = [
    {},
    {"router": "sequence", "router_input": "model"},
    {"router_input": "target", "r": [2, 4, 4, 8], "shared_r": 2},
    {"ffn_experts": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]


def adapt(model, **fields):
    given = {"target_modules": ["q_proj", "down_proj"], "objectives": {"load_balance": 0.1}, **fields}
    return get_peft_model(model, MoeLoraConfig(**given)).eval()


def dispatched(model):
    """Hook all modules down to the decoder layers and their parts, as on several devices."""
    for name, module in model.named_modules():
        if name.count(".") <= 3:
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=not name))
    return model


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_dispatched_model_is_adapted_like_any_other(llama, text, randomise, fields):
    base, model, hooked = llama(), adapt(llama(), **fields), adapt(dispatched(llama()), **fields)
    for item in (model, hooked):
        randomise(item)
    expected, found = model(**text), hooked(**text)
    torch.testing.assert_close(found.logits, expected.logits, atol=0, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    unloaded = hooked.unload()
    torch.testing.assert_close(unloaded(**text).logits, base(**text).logits, atol=0, rtol=0)
    for layer in unloaded.model.layers:
        assert type(layer) is type(base.model.layers[0]) and "_old_forward" in vars(layer)
        remove_hook_from_module(layer)
        assert layer.forward.__func__ is type(layer).forward


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_experts_are_brought_in_with_the_rest_of_an_offloaded_model(llama, text, randomise, fields):
    model = adapt(llama(), **fields)
    randomise(model)
    with torch.no_grad():
        expected = model(**text).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(**text).logits, expected, atol=0, rtol=0)


def test_weights_that_are_offloaded_already_are_refused(llama):
    base = llama()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers\.\*\.mlp\.down_proj: .* offload afterwards"):
        adapt(base)


def test_a_layer_with_another_forward_than_its_class_is_refused(llama):
    model = llama()
    layer = model.model.layers[0]
    plain = copy.copy(layer.forward)
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(ValueError, match="has a forward of its own"):
        adapt(model)
