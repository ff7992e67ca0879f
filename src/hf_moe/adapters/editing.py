"""Single experts of a trained adapter: added, removed, renamed, frozen.

The experts meant are those of all targets that have as many as the config's `num_experts`. A router is rebuilt for
the new number; each of its tensors keeps the rows of the experts that stay, and what belongs to no expert. The rows of
a new expert start as a fresh router's, or as those of the expert it copies.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from ..modeling.initialisation import initialize_mechanisms
from ..modeling.routing import Router
from .config import MoeLoraConfig, TargetSettings
from .experts import ExpertKind, build_kind
from .frozen import FrozenExperts, expert_stacks, hold_frozen, numbered_layers, release
from .layer import MoeLoraLayer, tuner_layers
from .model import INIT_STD


Expert = int | str


def expert_names(model: PeftModel, adapter_name: str = "default") -> list[str]:
    """Return the names of an adapter's experts, in order; an unnamed one is called by its number."""
    config = _config(model, adapter_name)
    return list(config.expert_names or (str(number) for number in range(config.num_experts)))


def rename_expert(model: PeftModel, expert: Expert, name: str, adapter_name: str = "default") -> None:
    """Give an expert, known by number or name, another name.

    Raises:
        ValueError: if there is no such expert, or the name is taken or no text.
    """
    names = expert_names(model, adapter_name)
    number = _number(names, expert)
    _check_name(name, names[:number] + names[number + 1 :], adapter_name)
    names[number] = name
    _config(model, adapter_name).expert_names = names


def freeze_experts(model: PeftModel, experts: Iterable[Expert], adapter_name: str = "default") -> None:
    """Keep these experts as they are in further training, to the bit; the others and the router train on.

    They have no gradient, and neither weight decay nor momentum reaches what the model computes or saves. An empty
    list lets every expert train again.

    Raises:
        ValueError: if there is no such expert, or the experts have no parameters of their own.
    """
    names, layers = expert_names(model, adapter_name), _layers(model, adapter_name)
    if isinstance(experts, str):
        raise ValueError(f"experts={experts!r} must be a list of experts, such as {[experts]}.")
    numbers = sorted({_number(names, expert) for expert in experts})
    hold_frozen(model)
    _config(model, adapter_name).frozen_experts = numbers or None
    for layer in layers:
        layer.frozen_experts.pop(adapter_name, None)
        for _, stack in expert_stacks(layer, adapter_name):
            release(stack)
        if numbers:
            layer.frozen_experts[adapter_name] = FrozenExperts(layer, adapter_name, numbers)
    hold_frozen(model)


def add_expert(
    model: PeftModel,
    name: str | None = None,
    *,
    copy_of: Expert | None = None,
    rank: int | None = None,
    adapter_name: str = "default",
) -> int:
    """Add an expert to every target of an adapter, behind the others, and return its number.

    A new expert computes nothing until it is trained, as in a new adapter, but the router may give it a share of every
    token at once. A copy computes what the copied expert does, and has its rows in the router. The parameters are new
    ones, which an optimizer from before does not train: make a new one.

    Args:
        name: the expert's name; when absent its number, or the next one that is no other expert's name.
        copy_of: number or name of the expert to copy, with its rank.
        rank: of a new expert, on every target; that of the others when absent, where they have one rank.

    Raises:
        ValueError: if the name is taken, if the rank is missing or no choice, or if the adapter cannot be edited.
    """
    config, names = _config(model, adapter_name), expert_names(model, adapter_name)
    number = config.num_experts
    if name is not None:
        _check_name(name, names, adapter_name)
    source = None if copy_of is None else _number(names, copy_of)
    if rank is not None and source is not None:
        raise ValueError(f"A copy has the rank of the expert that it copies: leave rank={rank} out, or copy_of.")
    named = config.expert_names is not None or name is not None
    _rebuild(model, adapter_name, [*range(number), source], rank)
    free = (str(other) for other in range(number, 2 * number + 1) if str(other) not in names)
    config.expert_names = [*names, next(free) if name is None else name] if named else None
    return number


def remove_expert(model: PeftModel, expert: Expert, adapter_name: str = "default") -> None:
    """Take an expert out of every target of an adapter; those behind it move up by one.

    The parameters are new ones, which an optimizer from before does not train: make a new one.

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
    """Return the targets that have the experts which are numbered and named."""
    config = _config(model, adapter_name)
    layers = numbered_layers(model, adapter_name, config)
    if not layers:
        found = {item.key[adapter_name]: item.num_experts(adapter_name) for item in _all_layers(model, adapter_name)}
        raise ValueError(
            f"No target of adapter {adapter_name!r} has the num_experts={config.num_experts} experts that its config "
            f"numbers; the targets have {found}: set num_experts to the number that is meant."
        )
    for layer in layers:
        kind = layer.experts[adapter_name]
        if not kind.own_parameters:
            raise ValueError(
                f"The experts of adapter {adapter_name!r} are {type(kind).__name__}, which share their parameters: "
                "none of them can be frozen, added or removed alone."
            )
    return layers


def _all_layers(model: PeftModel, adapter_name: str) -> list[MoeLoraLayer]:
    return [layer for layer in tuner_layers(model) if adapter_name in layer.experts]


def _check_name(name: str, others: list[str], adapter_name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"The name of an expert is a text that is not empty, and not {name!r}.")
    if name in others:
        raise ValueError(f"Adapter {adapter_name!r} has an expert {name!r} already; the others are {others}.")


def _number(names: list[str], expert: Expert) -> int:
    if isinstance(expert, str) and expert in names:
        return names.index(expert)
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < len(names):
        return expert
    raise ValueError(f"There is no expert {expert!r}; the experts are {names}.")


@torch.no_grad()
def _rebuild(model: PeftModel, adapter_name: str, sources: list[int | None], rank: int | None = None) -> None:
    """Make expert i of the adapter what expert `sources[i]` was, or a fresh one of this rank."""
    config = _config(model, adapter_name)
    if config.router["name"] == "host":  # type: ignore[index]
        raise ValueError(
            f"The router of adapter {adapter_name!r} is 'host': its experts go with those of the model that is "
            "adapted, one with each, so none can be added or removed. They can be frozen and renamed."
        )
    layers = _layers(model, adapter_name)
    _check_editable(config, layers, adapter_name, sources)
    hold_frozen(model)
    fields = _edited_fields(config, sources, rank)
    edited = replace(config, **fields, expert_names=None, frozen_experts=None)
    _check_others(model, adapter_name, config, edited, layers)
    settings = {layer: edited.settings(layer.key[adapter_name]) for layer in layers}
    # All that can be refused is built before anything is changed.
    routers = {}
    for layer in layers:
        if adapter_name in layer.moe_lora_router:
            old = layer.moe_lora_router[adapter_name]
            facts = {"causal": old.spec.causal, "vocab_size": old.spec.vocab_size}
            spec = edited.spec(old.spec.layer_idx, old.spec.hidden_size, settings[layer], **facts)
            routers[layer] = _edited_router(old, edited.build_router(spec, settings[layer]), sources)
    kinds = {layer: _edited_kind(layer, adapter_name, settings[layer], sources) for layer in layers}
    for layer, (kind, stacks) in kinds.items():
        trained = {container: stack.requires_grad for container, stack in expert_stacks(layer, adapter_name)}
        layer.frozen_experts.pop(adapter_name, None)  # of the experts before; those of now are frozen below
        layer.set_experts(adapter_name, edited, kind, stacks)
        for container, stack in expert_stacks(layer, adapter_name):
            stack.requires_grad_(trained[container])
            layer.moe_lora_ranks.to(stack.device)
        layer.router_group[adapter_name] = settings[layer].router_group
        if layer in routers:
            layer.moe_lora_router[adapter_name] = routers[layer]
    every_layer = _all_layers(model, adapter_name)
    specs = [
        layer.moe_lora_router[adapter_name].spec for layer in every_layer if adapter_name in layer.moe_lora_router
    ]
    for layer in every_layer:
        if adapter_name in layer.moe_lora_objectives:
            losses = edited.build_objectives(specs)
            initialize_mechanisms(losses, INIT_STD)  # their statistics start anew
            layer.moe_lora_objectives[adapter_name] = losses
    frozen = [new for new, old in enumerate(sources) if old in (config.frozen_experts or [])]
    if len(sources) > config.num_experts:
        frozen = [number for number in frozen if number != len(sources) - 1]  # a copy of a frozen expert is free
    for name, value in fields.items():
        setattr(config, name, value)
    config.expert_names = None
    freeze_experts(model, frozen, adapter_name)


def _check_editable(
    config: MoeLoraConfig, layers: list[MoeLoraLayer], adapter_name: str, sources: list[int | None]
) -> None:
    """Refuse to edit an adapter that is merged, or whose router knows an expert by its number."""
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is merged: unmerge_adapter() first.")
    kept = min(len(sources), config.num_experts)
    for layer in layers:
        if layer.deciding_router(adapter_name).reads == {"condition"} and sources[:kept] != list(range(kept)):
            raise ValueError(
                f"The router of adapter {adapter_name!r} is 'condition', which takes expert i for the id i: only the "
                "last expert can be removed, or the others would answer to other ids."
            )


def _edited_fields(config: MoeLoraConfig, sources: list[int | None], rank: int | None) -> dict[str, Any]:
    """Return the fields of the config that change with the experts."""
    number = config.num_experts

    def edited(r: int | list[int]) -> int | list[int]:
        if isinstance(r, list) and len(r) != number:
            return r  # of a target with another number of experts
        ranks = r if isinstance(r, list) else [r] * number
        fresh = ranks[0] if rank is None and len(set(ranks)) == 1 else rank
        if fresh is None and None in sources:
            raise ValueError(f"The experts have the ranks {ranks}: give the rank of the new one.")
        if isinstance(r, int) and fresh == r:
            return r
        return [fresh if source is None else ranks[source] for source in sources]  # type: ignore[misc]

    overrides = {}
    for key, own in config.target_overrides.items():
        others = own.get("num_experts", number) != number
        changes: dict[str, Any] = {} if others or "num_experts" not in own else {"num_experts": len(sources)}
        if "r" in own and not others:
            changes["r"] = edited(own["r"])
        elif others and isinstance(config.r, int):
            changes["r"] = own.get("r", config.r)  # which may become a list now
        overrides[key] = {**own, **changes}
    return {
        "num_experts": len(sources),
        "r": edited(config.r),
        "rank_pattern": {key: edited(r) for key, r in config.rank_pattern.items()},
        "target_overrides": overrides,
    }


def _check_others(
    model: PeftModel, adapter_name: str, config: MoeLoraConfig, edited: MoeLoraConfig, layers: list[MoeLoraLayer]
) -> None:
    """Refuse an edit behind which the config would say something else of the targets that are left as they are."""
    for layer in _all_layers(model, adapter_name):
        key, number = layer.key[adapter_name], layer.num_experts(adapter_name)
        if layer in layers or "call" in layer.deciding_router(adapter_name).reads:
            continue
        if number == edited.num_experts or edited.settings(key) != config.settings(key):
            raise ValueError(
                f"The target {key!r} of adapter {adapter_name!r} has {number} experts of its own. With "
                f"{edited.num_experts} experts elsewhere the config could not tell them apart from the others: edit "
                "the adapter to another number, or set the target's own r in target_overrides."
            )


def _edited_router(old: Router, new: Router, sources: list[int | None]) -> Router:
    """Fill a new router from the old one, expert by expert."""
    initialize_mechanisms(new, INIT_STD)
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
    layer: MoeLoraLayer, adapter_name: str, settings: TargetSettings, sources: list[int | None]
) -> tuple[ExpertKind, dict[str, torch.Tensor]]:
    """Return the experts of a target and their tensors, expert by expert from the old ones."""
    old = layer.experts[adapter_name].target
    target = layer.target(old.name, settings, old.init_zero)
    kind = build_kind(settings.experts, target)
    before, stacks = dict(expert_stacks(layer, adapter_name)), {}
    parts = target.num_host_experts
    for container, fresh in kind.tensors().items():
        stacks[container] = layer.stored(fresh).to(before[container])
        new_parts, old_parts = target.split(container, stacks[container]), old.split(container, before[container])
        for place, source in enumerate(sources):
            if source is not None:
                for part in range(parts):
                    new, was = new_parts[place * parts + part], old_parts[source * parts + part]
                    new.copy_(was.reshape(new.shape))
    return kind, stacks
