"""Of which modality the tokens of a call are, where its inputs and the model's config tell."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.memory import cache_of, cached_tokens
from ..modeling.routing_context import NUM_MODALITIES


TELL = (
    "pass mm_token_type_ids (0 text, 1 image, 2 video, 3 audio), or choose a router that does not read the modality."
)


class ModalityUnknown(ValueError):
    """What tells the modality of the tokens is missing; the message says what would."""


def modalities_of(model: PreTrainedModel, inputs: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """Return the modality of every token, (B, S) int64.

    Args:
        model: the root.
        inputs: of its call, by name.
        shape: B and S.

    Raises:
        ModalityUnknown: if neither ids in the inputs nor the placeholders of the config tell.
        ValueError: if the ids are of other tokens or name no modality.
    """
    input_ids = inputs.get("input_ids")
    # Ernie's own count the tokens around an image to it.
    for name in ("moe_mm_token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            return _checked(inputs[name], inputs, shape, name)
    if input_ids is None:
        raise ModalityUnknown(f"inputs_embeds do not tell which of the tokens are images: {TELL}")
    placeholders = placeholder_ids(model.config)
    text = model.config.get_text_config()
    others = [part for part in _with_parts(model.config) if part is not model.config and part is not text]
    if others and not any(placeholders.values()):
        raise ModalityUnknown(
            f"The config of {type(model).__name__} names no image_token_id, video_token_id or audio_token_id, and the "
            f"model is more than a decoder of text: {TELL}"
        )
    modality_ids = torch.zeros_like(input_ids, dtype=torch.long)
    taken = torch.zeros_like(input_ids, dtype=torch.bool)
    for name, ids in placeholders.items():
        found = torch.isin(input_ids, torch.tensor(sorted(ids), device=input_ids.device))
        if ids and any(ids & others for other, others in placeholders.items() if other != name):
            if bool((found & taken).any()):
                raise ModalityUnknown(
                    f"The config of {type(model).__name__} has one placeholder for several modalities, "
                    f"{placeholders}, and the call has such tokens: {TELL}"
                )
            taken = taken | found
        modality_ids = modality_ids.masked_fill(found, MODALITIES.index(name))
    return modality_ids


def _checked(given: torch.Tensor, inputs: Mapping[str, Any], shape: torch.Size, name: str) -> torch.Tensor:
    """Return the modality ids of the tokens of the call alone, which may come with those of the cached ones."""
    columns = given.shape[1] if given.dim() == 2 else -1
    if len(given) != shape[0] or columns not in (shape[1], shape[1] + cached_tokens(cache_of(inputs))):
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} of the tokens, with those of cached ones in front "
            f"or without, and have {tuple(given.shape)}."
        )
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < NUM_MODALITIES:
        raise ValueError(
            f"{name} must lie in [0, {NUM_MODALITIES}), for {', '.join(MODALITIES)}, and one is "
            f"{int(given.min()) if int(given.min()) < 0 else int(given.max())}."
        )
    return given[:, -shape[1] :].long()


def placeholder_ids(config: PreTrainedConfig) -> dict[str, set[int]]:
    """Return modality -> the ids of its placeholder tokens, which may stand in the config of a part."""
    found: dict[str, set[int]] = {name: set() for name in MODALITIES if name != "text"}
    for part in _with_parts(config):
        for name, ids in found.items():
            token_id = getattr(part, f"{name}_token_id", None)
            if isinstance(token_id, int):
                ids.add(token_id)
    return found


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)
