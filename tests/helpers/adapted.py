"""What tests look at of an adapted model."""

import inspect

import torch

from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.memory import cache_of


def with_cache(model, output):
    """Return the keyword argument that gives the cache of an output to the next call, by this version's name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = ("cache", "past_key_values", "cache_params")
    known = inspect.signature(base.forward).parameters
    found = next((name for name in names if name in known), None)
    # Our own models pass on what they do not name.
    return {found or next(name for name in names if name in output): cache_of(output)}


def logits(model, inputs, **extra):
    """Return the logits of a call without labels."""
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}, **extra).logits


def decisions(model):
    """Collect what every router decides from now on."""
    made = []
    for layer in tuner_layers(model):
        for router in layer.moe_lora_router.values():
            router.register_forward_hook(lambda module, args, output: made.append(output))
    return made


def real_logits(model, inputs):
    """Return the logits of all tokens but padding."""
    return logits(model, inputs)[inputs["attention_mask"].bool()]


def stacks(model, adapter="default"):
    """Return the stacks A and B of every target."""
    return [getattr(layer, name)[adapter] for layer in tuner_layers(model) for name in ("moe_lora_A", "moe_lora_B")]


def step(model, inputs, optimizer):
    """Take a step in training mode, and return the gradients of the stacks."""
    model.train()(**inputs).loss.backward()
    gradients = [stack.grad.clone() for stack in stacks(model)]
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return gradients
