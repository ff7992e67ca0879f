"""What the call of a model that knows nothing of routing tells of its tokens."""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.inputs import check_modality_ids, hides_rows, modalities_of, real_tokens
from ..modeling.memory import TokenMemory, cache_of, cached_tokens, foreign_state
from ..modeling.routing_context import RoutingContext


def call_context(model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext | None:
    """Return what the inputs of a call tell of its tokens; `None` where they tell nothing.

    Of images, one a row, all patches are real, unless a mask may hide some; their number shows in the first layer.
    The modalities of tokens are looked for where a router asks.
    """
    if model.main_input_name == "pixel_values":
        pixels = inputs.get("pixel_values")
        if pixels is None or any(inputs.get(name) is not None for name in ("pixel_mask", "pixel_attention_mask")):
            return None
        nothing = torch.zeros(len(pixels), 0, dtype=torch.long)
        return RoutingContext(nothing, nothing.bool())
    tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]  # (B, S, ...)
    if tokens is None:
        return None
    shape, cache = tokens.shape[:2], cache_of(inputs)
    for name in ("moe_mm_token_type_ids", "mm_token_type_ids"):
        ids = inputs.get(name)
        if ids is not None:  # which may come with those of the cached tokens
            columns = shape[1] + cached_tokens(cache)
            own = ids[:, -shape[1] :] if ids.dim() == 2 and ids.shape[1] == columns else ids
            check_modality_ids(own, tuple(shape))
    mask = real_tokens(model.config, inputs, tokens)
    return RoutingContext(
        partial(modalities_of, model, inputs, tokens, others=True),
        torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask,
        inputs.get("input_ids"),
        memory=TokenMemory(cache, foreign_state(inputs), hides_rows(inputs)),
        inputs=inputs,
    )
