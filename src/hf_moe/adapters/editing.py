"""Single experts of a trained adapter: added, removed, renamed, frozen.

The experts of an adapter are numbered and may have names, which its config keeps. A router is rebuilt for the new
number of experts; each of its tensors keeps the rows of the experts that stay, and what belongs to no expert. The rows
of a new expert start as a fresh router's, or as those of the expert it copies.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..modeling.routing import Router
from .config import MoeLoraConfig
from .experts import ExpertKind, build_kind
from .frozen import FrozenExperts, expert_stacks, hold_frozen, release
from .layer import MoeLoraLayer
from .model import INIT_STD
from .objectives import tuner_layers


Expert = int | str


def expert_names(model: PeftModel, adapter_name: str = "default") -> list[str]:
    """Return the names of an adapter's experts, in order; an unnamed one is called by its number."""
    config = _config(model, adapter_name)
    return list(config.expert_names or (str(number) for number in range(config.num_experts)))


def rename_expert(model: PeftModel, expert: Expert, name: str, adapter_name: str = "default") -> None:
    """Give an expert, known by number or name, another name.

    Raises:
        ValueError: if there is no such expert, or the name is taken.
    """
    names = expert_names(model, adapter_name)
    number = _number(names, expert)
    if name in names[:number] + names[number + 1 :]:
        raise ValueError(f"Adapter {adapter_name!r} has an expert {name!r} already; its experts are {names}.")
    names[number] = name
    _config(model, adapter_name).expert_names = names


def freeze_experts(model: PeftModel, experts: Iterable[Expert], adapter_name: str = "default") -> None:
    """Keep these experts as they are in further training, to the bit; the others and the router train on.

    They have no gradient, and neither weight decay nor momentum reaches what the model computes or saves.

    Args:
        model: the model with the adapter.
        experts: all that are to be frozen; an empty list lets every expert train again.
        adapter_name: the adapter.

    Raises:
        ValueError: if there is no such expert.
    """
    names = expert_names(model, adapter_name)
    numbers = sorted({_number(names, expert) for expert in experts})
    _config(model, adapter_name).frozen_experts = numbers or None
    for layer in _layers(model, adapter_name):
        layer.frozen_experts.pop(adapter_name, None)
        for _, stack in expert_stacks(layer, adapter_name):
            release(stack)
        if numbers:
            layer.frozen_experts[adapter_name] = FrozenExperts(numbers)
    hold_frozen(model)


def add_expert(
    model: PeftModel, name: str | None = None, *, copy_of: Expert | None = None, adapter_name: str = "default"
) -> int:
    """Add an expert to every target of an adapter, behind the others, and return its number.

    A new expert computes nothing until it is trained, as in a new adapter, but the router may give it a share of every
    token at once. A copy computes what the copied expert does, and has its rows in the router. The parameters are new
    ones: make a new optimizer.

    Args:
        model: the model with the adapter.
        name: the expert's name, its number when absent.
        copy_of: number or name of the expert to copy.
        adapter_name: the adapter.

    Raises:
        ValueError: if the name is taken, or the adapter cannot be edited.
    """
    config, names = _config(model, adapter_name), expert_names(model, adapter_name)
    number = config.num_experts
    if name is not None and name in names:
        raise ValueError(f"Adapter {adapter_name!r} has an expert {name!r} already; its experts are {names}.")
    source = None if copy_of is None else _number(names, copy_of)
    named = config.expert_names is not None or name is not None
    _rebuild(model, adapter_name, [*range(number), source])
    config.expert_names = [*names, str(number) if name is None else name] if named else None
    return number


def remove_expert(model: PeftModel, expert: Expert, adapter_name: str = "default") -> None:
    """Take an expert out of every target of an adapter; those behind it move up by one.

    The parameters are new ones: make a new optimizer.

    Raises:
        ValueError: if there is no such expert, if too few would be left for a token, or if the adapter cannot be
            edited.
    """
    config, names = _config(model, adapter_name), expert_names(model, adapter_name)
    number = _number(names, expert)
    keep = [other for other in range(config.num_experts) if other != number]
    named = config.expert_names is not None
    _rebuild(model, adapter_name, keep)
    config.expert_names = [names[other] for other in keep] if named else None


def _config(model: PeftModel, adapter_name: str) -> MoeLoraConfig:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, MoeLoraConfig):
        found = [name for name, item in model.peft_config.items() if isinstance(item, MoeLoraConfig)]
        raise ValueError(f"The model has no LoRA experts of the name {adapter_name!r}; it has {found}.")
    return config


def _layers(model: PeftModel, adapter_name: str) -> list[MoeLoraLayer]:
    return [layer for layer in tuner_layers(model) if adapter_name in layer.experts]


def _number(names: list[str], expert: Expert) -> int:
    if isinstance(expert, str) and expert in names:
        return names.index(expert)
    if isinstance(expert, int) and 0 <= expert < len(names):
        return expert
    raise ValueError(f"There is no expert {expert!r}; the experts are {names}.")


@torch.no_grad()
def _rebuild(model: PeftModel, adapter_name: str, sources: list[int | None]) -> None:
    """Make expert i of the adapter what expert `sources[i]` was, or a fresh one."""
    config, layers = _config(model, adapter_name), _layers(model, adapter_name)
    _check_editable(config, layers, adapter_name, sources)
    edited = copy.copy(config)
    edited.num_experts = len(sources)
    settings = edited.settings("")
    # All that can be refused is built before anything is changed.
    routers = {}
    for layer in layers:
        if adapter_name in layer.moe_lora_router:
            old = layer.moe_lora_router[adapter_name]
            spec = replace(old.spec, num_experts=len(sources), num_experts_per_tok=settings.num_experts_per_tok)
            routers[layer] = _edited_router(old, edited.build_router(spec, settings), sources)
    kinds = {layer: _edited_kind(layer, adapter_name, settings.experts, sources) for layer in layers}
    for layer, (kind, stacks) in kinds.items():
        layer.experts[adapter_name] = kind
        layer.router_group[adapter_name] = settings.router_group
        for container, stack in stacks.items():
            getattr(layer, container)[adapter_name] = stack
        if layer in routers:
            layer.moe_lora_router[adapter_name] = routers[layer]
    for layer in layers:
        if adapter_name in layer.moe_lora_objectives:
            losses = edited.build_objectives([router.spec for router in routers.values()])
            for objective in losses.by_name.values():
                objective.initialize(INIT_STD)  # their statistics start anew
            layer.moe_lora_objectives[adapter_name] = losses
    frozen = [new for new, old in enumerate(sources) if old in (config.frozen_experts or [])]
    if len(sources) > config.num_experts:
        frozen = [number for number in frozen if number != len(sources) - 1]  # a copy of a frozen expert is free
    config.num_experts, config.expert_names = len(sources), None
    freeze_experts(model, frozen, adapter_name)


def _check_editable(
    config: MoeLoraConfig, layers: list[MoeLoraLayer], adapter_name: str, sources: list[int | None]
) -> None:
    """Refuse to edit an adapter whose experts are bound to their number or to a setting of their own."""
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged: unmerge_adapter() first.")
    ranked = isinstance(config.r, list) or any(isinstance(rank, list) for rank in config.rank_pattern.values())
    overridden = any(
        {"num_experts", "router", "experts", "r"} & set(fields) for fields in config.target_overrides.values()
    )
    if ranked or overridden:
        raise ValueError(
            f"Adapter {adapter_name!r} sets ranks, experts or routers of their own for single experts or targets: "
            "experts can be added and removed where all are alike."
        )
    renumbered = sources[: config.num_experts] != list(range(min(len(sources), config.num_experts)))
    name = config.router["name"]  # type: ignore[index]
    if name == "host" or (name == "condition" and renumbered):
        raise ValueError(
            f"The router {name!r} chooses an expert by its number, which would change: only the last expert of "
            "'condition' can be removed, and none of 'host'."
        )


def _edited_router(old: Router, new: Router, sources: list[int | None]) -> Router:
    """Fill a new router from the old one, expert by expert.

    Raises:
        ValueError: if a tensor does not tell which of its entries belong to which expert.
    """
    new.initialize(INIT_STD)
    new.to(next((tensor.device for tensor in (*old.parameters(), *old.buffers())), torch.device("cpu")))
    before, experts = old.state_dict(), old.spec.num_experts
    for name, tensor in new.state_dict().items():
        was = before[name]
        changed = [dim for dim, (a, b) in enumerate(zip(was.shape, tensor.shape, strict=True)) if a != b]
        if not changed:
            tensor.copy_(was)
            continue
        dim = changed[0]
        others = range(experts, was.shape[dim])  # candidates that are no experts stand behind the experts
        if len(changed) > 1 or tensor.shape[dim] != len(sources) + len(others):
            raise ValueError(
                f"{type(old).__name__}.{name}, {tuple(was.shape)}, does not tell which entries belong to which "
                "expert: experts of this router can be frozen and renamed, not added or removed."
            )
        for place, source in enumerate([*sources, *others]):
            if source is not None:
                tensor.select(dim, place).copy_(was.select(dim, source))
    for parameter, was_parameter in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(was_parameter.requires_grad)
    return new.train(old.training)


def _edited_kind(
    layer: MoeLoraLayer, adapter_name: str, settings: dict[str, Any], sources: list[int | None]
) -> tuple[ExpertKind, dict[str, nn.Parameter]]:
    """Return the experts of a target and their stacks, expert by expert from the old ones."""
    target = layer.experts[adapter_name].target
    old = dict(expert_stacks(layer, adapter_name))
    # On stacked weights, every expert has a part for each expert of the host.
    parts = target.num_experts // len(next(iter(old.values())))
    number = parts * len(sources)
    kind = build_kind(settings, replace(target, num_experts=number, ranks=(target.rank,) * number))
    stacks = {}
    for name, fresh in kind.tensors().items():
        was = old[f"moe_lora_{name}"]
        stack = layer.stored(fresh).to(was)
        for place, source in enumerate(sources):
            if source is not None:
                stack[place] = was[source]
        stacks[f"moe_lora_{name}"] = nn.Parameter(stack, requires_grad=was.requires_grad)
    return kind, stacks
