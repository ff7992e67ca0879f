"""What the tuner has to know of a model that knows nothing of it."""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..modeling.parts import HostParts, host_parts


PARTS = ("language_model", "towers")


def parts_of(model: nn.Module) -> HostParts | None:
    """Return the parts of a model; `None` where all of it is one part, and of encoder-decoders."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    parts = host_parts(model)
    return parts if parts.towers or parts.connectors else None


def part_of(parts: HostParts | None, key: str) -> str | None:
    """Return the part that module `key` lies in; `None` for a head, and where all of the model is one part."""
    if parts is None or key in parts.embeddings:
        return None
    return "towers" if parts.holder(key) is not None else "language_model"


def enclosing_layer(model: nn.Module, key: str) -> str | None:
    """Return the name of the layer that module `key` lies in: the unit that checkpointing recomputes, if any."""
    parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]  # innermost first
    for name in parents:
        if isinstance(model.get_submodule(name), GradientCheckpointingLayer):
            return name
    lists = [name for name in parents if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)]
    return lists[-1] if lists else None


def is_layer(model: nn.Module, key: str) -> bool:
    """Whether module `key` is itself the layer that modules inside of it lie in."""
    return enclosing_layer(model, f"{key}.") == key


def reads_text(model: nn.Module, layer: nn.Module | None) -> bool:
    """Whether a layer is one of a decoder or encoder that reads the root's token ids."""
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return False
    return any(module is layer for module in model.get_decoder().modules())


def known_tokens(model: nn.Module, layer_name: str | None) -> str | None:
    """Return what the root's inputs tell of a layer's tokens.

    Returns:
        `"text"`: the layer reads the root's token ids. `"image"`: the root reads one image per row, and all layers see
        the same patches of it. `None`: nothing, as in the vision tower of a model for text, in encoder-decoders, and
        in towers that merge patches from stage to stage.
    """
    if layer_name is None or not isinstance(model, PreTrainedModel):
        return None
    layer = model.get_submodule(layer_name)
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if model.config.is_encoder_decoder or not takes_kwargs:
        return None
    if reads_text(model, layer):
        return "text"
    if model.main_input_name != "pixel_values" or not is_bidirectional(layer):
        return None
    return "image" if layer_width(model, layer_name) == _configured_width(model, layer_name) else None


def is_bidirectional(layer: nn.Module | None) -> bool:
    """Whether the attention in a layer is known to see later tokens."""
    if layer is None:
        return False
    return {module.is_causal for module in layer.modules() if hasattr(module, "is_causal")} == {False}


def layer_width(model: nn.Module, name: str) -> int:
    """Return the width of the hidden states that enter layer `name`.

    It is the `hidden_size` of the config around it, unless the norms in the layer have another: towers with stages,
    such as Swin's, have a width in each.
    """
    width = _configured_width(model, name)
    weights = (p for key, p in model.get_submodule(name).named_parameters() if key.endswith("weight"))
    norms = {weight.numel() for weight in weights if weight.dim() == 1}
    if width is not None and (width in norms or not norms):
        return width
    if len(norms) == 1:
        return norms.pop()
    raise ValueError(
        f"The width of what enters {name!r} is unknown: its config says {width}, its norms {sorted(norms)}. Name "
        "linear layers in target_modules, and set router_input='target', where every target has its own router."
    )


def _configured_width(model: nn.Module, name: str) -> int | None:
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)] + [""]
    widths = (getattr(getattr(model.get_submodule(item), "config", None), "hidden_size", None) for item in parents)
    return next((width for width in widths if width is not None), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: PyTorch's, Transformers' `Conv1D`, or one that a quantiser has put there."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(width, int) for width in widths) and not module._modules


@torch.no_grad()
def computes_linear(layer: nn.Module) -> bool:
    """Whether a layer computes its weight's product and nothing else, as subclasses of `nn.Linear` need not."""
    if type(layer) in (nn.Linear, Conv1D):
        return True
    if not layer.weight.is_floating_point() or layer.weight.is_meta:
        return False
    probe = torch.linspace(-1, 1, layer.in_features).to(layer.weight)[None]
    return torch.allclose(layer(probe), F.linear(probe, layer.weight, layer.bias), rtol=1e-2, atol=1e-3)


def is_expert_stack(module: nn.Module) -> bool:
    """Whether a module holds the experts of a MoE block as stacks, in the form of Transformers' own backends."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    if not module.has_gate and not hasattr(module, "act_fn"):  # those with a gate apply what they like
        return False
    stacks = (getattr(module, name, None) for name in (input_name(module), "down_proj"))
    return all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)


def input_name(stack: nn.Module) -> str:
    """Return the name of the stacked weight that reads the hidden states."""
    return "gate_up_proj" if stack.has_gate else "up_proj"


def swap_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class, whose forward runs also where the old one has been bound to the module itself."""
    bound = vars(module)  # where the hooks of Accelerate replace the forward, and keep what theirs calls
    name = next((name for name in ("_old_forward", "forward") if name in bound), None)
    if name is not None:
        if getattr(bound[name], "__func__", None) is not type(module).forward:
            raise ValueError(
                f"A {type(module).__name__} has a forward of its own, {bound[name]!r}, in place of that of its class, "
                "and LoRA experts cannot tell it what they need: adapt the model before its layers are changed."
            )
        bound[name] = MethodType(cls.forward, module)
    module.__class__ = cls
