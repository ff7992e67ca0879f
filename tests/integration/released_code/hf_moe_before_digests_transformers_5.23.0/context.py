# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
"""What a call of the model tells its routers."""

import torch

from .routing import RoutingContext, RoutingOverrides


def build_context(
    config,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    condition_ids: dict[str, torch.Tensor] | None,
    routing_overrides: RoutingOverrides | None,
    progress: float,
) -> RoutingContext:
    """Build the routing context of a forward pass.

    Args:
        config: the `HfMoeConfig`, for the ids of the placeholder tokens.
        input_ids, inputs_embeds, attention_mask, mm_token_type_ids, condition_ids, routing_overrides: see
            `HfMoeModel.forward`.
        progress: how far training is, 0 to 1.

    Raises:
        ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, or if `mm_token_type_ids` does not
            have their shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    batch, positions = given.shape[:2]
    device = given.device
    token_mask = torch.ones(batch, positions, dtype=torch.bool, device=device)
    # A 4-D mask belongs to a static cache, at inference, where every token of the call counts as real.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        token_mask = attention_mask[:, -positions:].bool()
    if mm_token_type_ids is None:
        mm_token_type_ids = torch.zeros(batch, positions, dtype=torch.long, device=device)
        placeholders = (config.image_token_id, config.video_token_id, config.audio_token_id)
        for modality, token_id in enumerate(placeholders, start=1):
            if token_id is not None and input_ids is not None:
                mm_token_type_ids = mm_token_type_ids.masked_fill(input_ids == token_id, modality)
    elif mm_token_type_ids.shape != (batch, positions):
        raise ValueError(
            f"mm_token_type_ids must have the shape {(batch, positions)} of the tokens, got "
            f"{tuple(mm_token_type_ids.shape)}."
        )
    return RoutingContext(
        modality_ids=mm_token_type_ids.long(),
        token_mask=token_mask,
        input_ids=input_ids,
        condition_ids=condition_ids,
        progress=progress,
        overrides=routing_overrides,
    )
