"""What the inputs of a model tell of its tokens: which are real, and of which modality."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.inputs import real_tokens
from ..modeling.memory import TokenMemory, cache_of, foreign_state
from ..modeling.routing_context import RoutingContext
from .contexts import AdapterContext, ImageContext, UnknownModality
from .modalities import ModalityUnknown, modalities_of


def root_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of the root by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def token_context(model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext | None:
    """Return what the inputs of the root tell of its tokens; `None` where it got none."""
    given = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if given is None:
        return None
    own = getattr(model, "routing_context", None)
    if own is not None:  # one of our own models, which knows best
        return with_modalities(own(**inputs), model, inputs)
    real = real_tokens(model.config, inputs, given)
    token_mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if real is None else real
    memory = TokenMemory(cache_of(inputs), foreign_state(inputs), hides_padding=real is None)
    context = RoutingContext(token_mask.long(), token_mask, inputs.get("input_ids"), memory=memory, inputs=inputs)
    return with_modalities(context, model, inputs)


def with_modalities(context: RoutingContext, model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext:
    """Return what is known of the tokens, with their modalities; routers that read them refuse unknown ones."""
    try:
        context.modality_ids = modalities_of(model, inputs, context.token_mask.shape)
    except ModalityUnknown as error:
        return UnknownModality(context, str(error))
    return context


def text_context(
    model: PreTrainedModel, inputs: dict[str, Any], conditions: Callable[[int], dict[str, torch.Tensor]]
) -> AdapterContext | None:
    """Return what a model that reads token ids tells its layers; `None` where it got none."""
    tokens = token_context(model, inputs)
    if tokens is None:
        return None
    tokens.condition_ids = conditions(len(tokens.token_mask))
    return AdapterContext(tokens)


def image_context(
    model: PreTrainedModel, inputs: dict[str, Any], conditions: Callable[[int], dict[str, torch.Tensor]]
) -> ImageContext | None:
    """Return what a vision encoder tells its layers; `None` where a mask says that some patches are padding."""
    pixels = inputs.get("pixel_values")
    if pixels is None or any(inputs.get(name) is not None for name in ("pixel_mask", "pixel_attention_mask")):
        return None
    return ImageContext(len(pixels), conditions(len(pixels)))
