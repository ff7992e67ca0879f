"""The routing context of a call: how it is built from the inputs, and how it reaches the layers.

The call of the whole model opens it, in a context variable. A hook on the decoder hands it down as an argument, the
one thing that survives every kind of recomputation; towers never see it. The model without its head opens one of its
own where it is called by itself, as trainers that compute their loss outside of the model do.
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .attention_blocks import masks_with_blocks
from .block import Block
from .inputs import (
    ModalityUnknown,
    check_ids,
    check_mask,
    check_mask_and_positions,
    check_tokens,
    conditions_read,
    hides_rows,
    learned_positions,
    modalities_of,
    real_tokens,
)
from .layer_spec import Site
from .memory import TokenMemory, cache_of, foreign_state
from .outputs import routed_output, router_logits
from .overrides import RoutingOverrides
from .replacement import Replacement
from .routing import Router, at_least_float32
from .routing_context import CALL_CONTEXT, RoutingContext
from .subclasses import same_name


# What a call may bring besides the host's own inputs.
ROUTING_INPUTS: dict[str, Any] = {
    "mm_token_type_ids": torch.Tensor | None,
    "condition_ids": dict[str, torch.Tensor] | None,
    "routing_overrides": RoutingOverrides | None,
    "routing_context": RoutingContext | None,
    "output_router_logits": bool | None,
}


def moe_blocks(model: nn.Module) -> dict[Site, Block]:
    """Return the MoE layers of a model by site, those of towers and connectors among them."""
    return {module.spec.site: module for module in model.modules() if isinstance(module, Block)}


def routers_of(model: nn.Module) -> dict[Site, Router]:
    """Return the routers of a model by the sites of their decisions; a block may have several."""
    holders = [module for module in model.modules() if isinstance(module, Block | Replacement)]
    return {router.spec.site: router for holder in holders for router in holder.routers}


def shared_parts(model: nn.Module) -> nn.ModuleDict:
    """Return fresh modules of what the routers of a model share, by their names in `context.shared`."""
    groups: dict[str, list[Router]] = {}
    for router in routers_of(model).values():
        groups.setdefault(router.shared_name, []).append(router)
    parts = {name: type(routers[0]).shared_part(routers) for name, routers in groups.items()}
    return nn.ModuleDict({name: at_least_float32(part) for name, part in parts.items() if part is not None})


def build_context(model: PreTrainedModel, inputs: dict[str, Any], progress: float) -> RoutingContext:
    """Build what the routers may know of a forward pass.

    Args:
        model: the model that is called, with its head or without.
        inputs: what it is called with, by name. The modalities are those of `moe_mm_token_type_ids`, in which Ernie
            counts the tokens around an image to it, else of `mm_token_type_ids`, else of the placeholders.
        progress: how far training is, 0 to 1.

    Raises:
        ValueError: if an argument does not fit the others or the model.
    """
    config, input_ids, inputs_embeds = model.config, inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = check_tokens(config, input_ids, inputs_embeds)
    check_mask(inputs.get("attention_mask"), tokens)
    modalities, overrides = inputs.get("moe_mm_token_type_ids"), inputs.get("routing_overrides")
    if modalities is None:
        modalities = inputs.get("mm_token_type_ids")
    conditions = inputs.get("condition_ids")
    routers = routers_of(model).values() if conditions is not None else ()
    check_ids(tokens, modalities, conditions, conditions_read(routers))
    if overrides is not None:
        if not isinstance(overrides, RoutingOverrides):
            raise ValueError(f"routing_overrides must be RoutingOverrides(...), got {type(overrides).__name__}.")
        overrides.check_sites(routers_of(model))
    token_mask = real_tokens(config, inputs, tokens)
    all_real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    context = RoutingContext(
        modality_ids=_known_modalities(model, inputs, tokens),
        token_mask=all_real if token_mask is None else token_mask,
        input_ids=input_ids,
        condition_ids=conditions,
        progress=progress,
        overrides=overrides,
        memory=TokenMemory(cache_of(inputs), foreign_state(inputs), hides_rows(inputs)),
        inputs=inputs,
    )
    if inputs.get("moe_mm_token_type_ids") is not None:
        plain = {name: value for name, value in inputs.items() if name != "moe_mm_token_type_ids"}
        context.placeholders = modalities_of(model, plain, tokens)
    context.shared = dict(model.base_model.shared_routing.items())
    return context


def _known_modalities(model: PreTrainedModel, inputs: dict[str, Any], tokens: torch.Tensor) -> Any:
    """Return the modalities of the tokens, or what raises where a router asks for unknown ones."""
    try:
        return modalities_of(model, inputs, tokens)
    except ModalityUnknown:
        return functools.partial(modalities_of, model, inputs, tokens)


def carry_context(backbone: Any, decoder: Any, attention_blocks: str | None = None) -> None:
    """Let a host carry the routing context: its model without a head where that is called, and its decoder inwards.

    Args:
        attention_blocks: of the `moe_config`.
    """
    backbone.arguments = Arguments.of(type(backbone).forward)
    decoder.max_positions = learned_positions(decoder)
    decoder.attention_blocks, decoder.arguments = attention_blocks, Arguments.of(type(decoder).forward)
    backbone.register_forward_pre_hook(_enter, with_kwargs=True)
    backbone.register_forward_hook(_leave, with_kwargs=True)
    backbone.__class__ = closing_class(type(backbone))
    # Last, for the two may be one.
    decoder.register_forward_pre_hook(_hand_down, with_kwargs=True)


class Arguments(NamedTuple):
    """The names of a method's arguments, and of those that may be given by position."""

    names: frozenset[str]
    positional: tuple[str, ...]

    @classmethod
    def of(cls, method: Any) -> "Arguments":
        """Read the signature of a method."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        given = [item for item in list(inspect.signature(method).parameters.values())[1:] if item.kind not in kinds]
        positional = tuple(item.name for item in given if item.kind is item.POSITIONAL_OR_KEYWORD)
        return cls(frozenset(item.name for item in given), positional)


@same_name
def closing_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a model's class whose calls leave no context behind, however they end."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = CALL_CONTEXT.get()
        try:
            return host_class.__call__(self, *args, **kwargs)
        finally:  # hooks do not hear of a KeyboardInterrupt
            CALL_CONTEXT.restore(before)

    return {"__call__": __call__}


def open_call(model: Any, context: RoutingContext) -> None:
    """Open a context until the call of a model ends, whose class is a [`closing_class`]."""
    context.opened_by = model
    CALL_CONTEXT.set(context)


def _enter(backbone: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before the model without its head: open a context where it is called by itself."""
    names, positional = backbone.arguments
    inner = {name: value for name, value in kwargs.items() if name not in ROUTING_INPUTS or name in names}
    context = CALL_CONTEXT.get()
    if context is None:
        context = kwargs.get("routing_context")
        if context is None:
            # The composed host takes its cache by position too, after the others.
            inputs = {**dict(zip((*positional, "past_key_values"), args, strict=False)), **kwargs}
            context = build_context(backbone, inputs, progress=1.0)
        open_call(backbone, context)
    if context.opened_by is backbone:
        context.wants_router_logits = kwargs.get("output_router_logits")
    return args, inner


def _leave(backbone: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after it: keep what was remembered, and return the router logits if they are asked."""
    context = CALL_CONTEXT.get()
    if context is None or context.opened_by is not backbone:
        return None
    context.memory.keep(output, kwargs, args)
    if isinstance(output, ModelOutput) and wants_router_logits(backbone.config, context.wants_router_logits):
        return routed_output(output, router_logits=router_logits(context))
    return None


def wants_router_logits(config: Any, given: bool | None) -> bool:
    """Whether a call returns its router logits; tools set the field on the decoder's config."""
    if given is not None:
        return given
    return bool(config.output_router_logits or config.get_text_config(decoder=True).output_router_logits)


def _hand_down(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before the decoder: check what reaches it, and pass the context on to the layers."""
    context = CALL_CONTEXT.get()
    if context is None:
        return None
    tokens = kwargs.get("inputs_embeds")
    tokens = kwargs.get("input_ids") if tokens is None else tokens
    if tokens is not None:
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        given = (kwargs.get("attention_mask"), kwargs.get("position_ids"), cache, decoder.max_positions)
        check_mask_and_positions(tokens, *given)
    embeddings = kwargs.get("inputs_embeds")
    context.embeddings = None if embeddings is None else embeddings.detach()
    if decoder.attention_blocks is not None:
        kwargs = {**dict(zip(decoder.arguments.positional, args, strict=False)), **kwargs}
        kwargs["attention_mask"] = masks_with_blocks(decoder, context, decoder.attention_blocks, kwargs)
        args = ()
    return args, {**kwargs, "routing_context": context}
