"""What the inputs of a model tell of its tokens: which are real, of which modality, in which document."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.routing_context import RoutingContext
from .contexts import AdapterContext, ImageContext, UnknownModality
from .documents import packed_documents
from .memory import cache_of, cached_tokens, first_column, foreign_state
from .modalities import ModalityUnknown, modalities_of


def root_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of the root by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def real_tokens(model: PreTrainedModel, inputs: dict[str, Any], length: int) -> torch.Tensor | None:
    """Return which of the last `length` tokens are no padding, (B, length) bool; `None` if the mask does not tell."""
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # of the past as well, and of free places behind
        start = first_column(inputs, mask.shape[1], length)
        return mask[:, start : start + length].bool()
    if cache is None or not cache.is_compileable:
        return None
    # `generate` makes the masks for a cache of fixed size itself, one for each kind of layers: (B, 1, S, cache).
    if isinstance(mask, dict):
        mask = mask.get(model.config.get_text_config().layer_types[0])
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    # All tokens but padding attend to themselves.
    offset = cached_tokens(cache) - int(cache.get_mask_sizes(length, 0)[1])
    own = mask[:, 0].diagonal(offset, dim1=-2, dim2=-1)  # (B, S)
    return own if own.dtype is torch.bool else own == 0


def token_context(model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext | None:
    """Return what the inputs of the root tell of its tokens; `None` where it got none."""
    given = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if given is None:
        return None
    shape, device = given.shape[:2], given.device
    token_mask = real_tokens(model, inputs, shape[1])
    own = getattr(model, "routing_context", None)
    if own is not None:  # one of our own models, which knows best
        context = own(**inputs)
        context.token_mask = context.token_mask if token_mask is None else token_mask
        return with_modalities(context, model, inputs)
    if token_mask is None:
        token_mask = torch.ones(shape, dtype=torch.bool, device=device)
    context = RoutingContext(token_mask.long(), token_mask, inputs.get("input_ids"))
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
    rows, length = tokens.token_mask.shape
    tokens.condition_ids = conditions(rows)
    hides_padding = inputs.get("attention_mask") is not None and real_tokens(model, inputs, length) is None
    cache = cache_of(inputs)
    documents = None if cached_tokens(cache) else packed_documents(inputs, tokens.token_mask.shape)
    labels = inputs.get("labels")
    labelled = None
    if isinstance(labels, torch.Tensor) and labels.shape == tokens.token_mask.shape:
        labelled = labels != -100
    return AdapterContext(tokens, cache, hides_padding, documents, foreign_state(inputs), labelled)


def image_context(
    model: PreTrainedModel, inputs: dict[str, Any], conditions: Callable[[int], dict[str, torch.Tensor]]
) -> ImageContext | None:
    """Return what a vision encoder tells its layers; `None` where a mask says that some patches are padding."""
    pixels = inputs.get("pixel_values")
    if pixels is None or any(inputs.get(name) is not None for name in ("pixel_mask", "pixel_attention_mask")):
        return None
    return ImageContext(len(pixels), conditions(len(pixels)))
