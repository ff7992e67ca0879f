"""PEFT's own LoRA on the models of this library, whose experts are stacked parameters and no linear layers.

    model = get_lora_model(model, ["attention", "experts"], r=16)
    ...                                     # training
    check_lora_trained(model)

`target_modules="all-linear"` would miss every routed expert without a word. Here the parts are asked for by name, and
every parameter of them is known to have an adapter before training starts, and to have used it afterwards.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from ..modeling.gating import check_choice
from ..modeling.host_layers import FFN_NAMES, decoder_layers
from ..modeling.parts import HostParts, host_parts, text_decoder


PARTS = ("attention", "feed_forward", "experts", "router", "connector", "tower", "vision_tower")

# Fields of `LoraConfig` that choose targets. PEFT would not hold full names, which parts become, against the layers.
FROM_PARTS = {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}

# What PEFT's LoRA cannot do on a parameter that is no linear layer, besides its variants, such as DoRA.
LINEAR_ONLY = {"lora_dropout", "lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication"}

# Ways to start that have B = 0; those that do without the weight of a linear layer.
ZERO_STARTS = (True, "gaussian", "eva")
STARTS_ON_PARAMETERS = (True, False, "gaussian")


def lora_targets(model: PreTrainedModel, parts: Iterable[str] = ("attention", "experts")) -> dict[str, list[str]]:
    """Return the `target_modules` and `target_parameters` of a `LoraConfig` that adapts the named parts of a model.

    Args:
        model: a model of this library, with the package's code or its own.
        parts: of `"attention"`; `"feed_forward"`, the dense ones; `"experts"`, routed and shared ones; `"router"`;
            `"connector"`; `"tower"`, all towers, or `"vision_tower"`, that for images.

    Raises:
        ValueError: if a part is unknown or the model has nothing of it that LoRA could adapt.
    """
    if getattr(model.config, "moe_config", None) is None:
        raise ValueError(
            f"{type(model).__name__} is no model of this library, whose parts lora_targets knows: name the targets of "
            "other models in PEFT's target_modules and target_parameters."
        )
    targets: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for part in parts:
        check_choice("parts", part, PARTS)
        found = list(_parameters_of(model, part))
        if not found:
            raise ValueError(f"The model has no {part} with weights for LoRA: leave it out of parts.")
        for name in found:
            module_name, _, parameter_name = name.rpartition(".")
            if isinstance(model.get_submodule(module_name), nn.Linear):
                targets["target_modules"].append(module_name)
            else:
                targets["target_parameters"].append(f"{module_name}.{parameter_name}")
    return targets


def get_lora_model(
    model: PreTrainedModel,
    parts: Iterable[str] = ("attention", "experts"),
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """Put PEFT's LoRA on the named parts of a model, and make sure that it is there.

    Args:
        model: a model of this library.
        parts: as in [`lora_targets`].
        adapter_name: name of the adapter.
        options: further fields of PEFT's `LoraConfig`, such as `r`, without those that choose targets.

    Raises:
        ValueError: if a part is unknown, if an option does not work on its parameters, or if a parameter got no
            adapter.
    """
    parts = list(parts)
    given = FROM_PARTS & set(options)
    if given:
        raise ValueError(
            f"{sorted(given)} follow from parts={parts}: name the parts, or choose among the names that "
            "lora_targets(model, parts) returns for a LoraConfig of your own."
        )
    config = LoraConfig(**lora_targets(model, parts), **options)
    _check_config(config)
    wanted = [name for part in parts for name in _parameters_of(model, part)]
    peft_model = get_peft_model(model, config, adapter_name)
    check_lora_covers(peft_model, wanted, adapter_name)
    for _, layer in _adapted_parameters(peft_model, adapter_name):
        lora_b = layer.lora_B[adapter_name].weight.detach()
        if lora_b.any():
            layer.lora_b_at_start = {**getattr(layer, "lora_b_at_start", {}), adapter_name: lora_b.clone()}
    return peft_model


def _check_config(config: LoraConfig) -> None:
    """Refuse what PEFT's LoRA cannot do on stacked parameters."""
    if not config.target_parameters:
        return
    for field in fields(config):
        found = getattr(config, field.name)
        if found and (field.name in LINEAR_ONLY or field.metadata.get("is_lora_variant")):
            raise ValueError(
                f"{field.name}={found!r} does not work where LoRA adapts parameters that are no linear layers, such "
                f"as {config.target_parameters[0]!r}: set {field.name}={field.default!r}, or leave experts and router "
                "out."
            )
    if config.init_lora_weights not in STARTS_ON_PARAMETERS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} starts from a linear layer, and "
            f"{config.target_parameters[0]!r} is none: set one of {STARTS_ON_PARAMETERS}."
        )


def check_lora_covers(model: PeftModel, parameters: Iterable[str], adapter_name: str = "default") -> int:
    """Return the number of `parameters`, names in the base model, after a check that each has an adapter.

    Raises:
        ValueError: naming those that have none.
    """
    covered = {name for name, _ in _adapted_parameters(model, adapter_name)}
    wanted = list(parameters)
    missing = [name for name in wanted if name not in covered]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} parameters got no LoRA, among them {missing[:3]}: check the targets and "
            "the version of peft."
        )
    return len(wanted)


def check_lora_trained(model: PeftModel, adapter_name: str = "default") -> int:
    """Return the number of adapted parameters, after a check that training has reached each of them.

    LoRA starts with B = 0, so an adapter with B = 0 has never had a gradient. Where `init_lora_weights` starts with
    another B, the one that [`get_lora_model`] has noted counts. Single experts that no token has chosen are named in a
    warning.

    Raises:
        ValueError: if the model has no LoRA, if the B of a parameter is as it was at the start, or if it is not known
            what that was.
    """
    adapted = list(_adapted_parameters(model, adapter_name))
    if not adapted:
        raise ValueError(f"The model has no LoRA of the name {adapter_name!r}.")
    init = model.peft_config[adapter_name].init_lora_weights
    untouched, idle = [], []
    for name, layer in adapted:
        change = layer.lora_B[adapter_name].weight.detach()  # (out, r), or (out, r * E)
        start = getattr(layer, "lora_b_at_start", {}).get(adapter_name)
        if start is not None:
            change = change - start.to(change)
        elif init not in ZERO_STARTS:
            raise ValueError(
                f"Whether training has changed {name!r} is unknown: init_lora_weights={init!r} starts with B other "
                "than zero, which get_lora_model notes: make the adapter with it, and check what was trained."
            )
        if not change.any():
            untouched.append(name)
        elif isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            used = change.view(len(change), -1, layer.num_experts).abs().sum((0, 1)) > 0
            idle += [f"{name}[{expert}]" for expert in (~used).nonzero().flatten().tolist()]
    if untouched:
        raise ValueError(
            f"Training has not changed the LoRA of {len(untouched)} of {len(adapted)} parameters, among them "
            f"{untouched[:3]}: their B is as it started. Check that they took part in the loss and that the optimizer "
            "has them."
        )
    if idle:
        warnings.warn(f"No token has reached the LoRA of {len(idle)} experts, among them {idle[:3]}.", stacklevel=2)
    return len(adapted)


def _adapted_parameters(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield name in the base model and adapter of every parameter with LoRA."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            parameter_name = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            # Two wrapped parameters of one module lie in each other.
            yield f"{name.replace('.base_layer', '')}.{parameter_name}", module


def _parameters_of(model: PreTrainedModel, part: str) -> Iterator[str]:
    """Yield the names of the matrices and stacks of a part that LoRA can adapt."""
    parts = host_parts(model)
    layers = decoder_layers(text_decoder(model))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for name, parameter in model.named_parameters():
        module_name, _, own_name = name.rpartition(".")
        if "bias" in own_name or part not in _parts_of(name, prefix, parts):
            continue
        module = model.get_submodule(module_name)
        # The connector of Gemma 3 is a matrix and no layer.
        stacked = part in ("experts", "router") or (part == "connector" and not hasattr(module, "weight"))
        if isinstance(module, nn.Linear) or (stacked and parameter.dim() in (2, 3)):
            yield name


def _parts_of(name: str, layers: str, parts: HostParts) -> tuple[str, ...]:
    """Return the parts that a parameter belongs to; `layers` is the name of the decoder's list of layers."""
    holder = parts.holder(name)
    if holder is not None:
        if holder in parts.connectors:
            return ("connector",)
        return ("tower", "vision_tower") if "image" in parts.modalities[holder] else ("tower",)
    if not name.startswith(f"{layers}."):
        return ()
    inside = name.removeprefix(f"{layers}.").split(".")[1:]  # without the number of the layer
    if inside[0] not in FFN_NAMES:
        return ("attention",)
    if inside[1] == "gate":
        return ("router",)
    return ("experts",) if "expert" in inside[1] else ("feed_forward",)
