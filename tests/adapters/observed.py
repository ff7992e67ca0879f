"""What tests look at of an adapted model."""

import torch

from hf_moe.adapters.layer import tuner_layers


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
