"""Placeholders of images, videos and sounds in a text: their tokens, their ids, and the modality of these."""

from collections.abc import Mapping
from typing import Any

import torch

from ..modeling.inputs import placeholder_ids
from ..modeling.processing_hf_moe import HfMoeProcessor
from .messages import MEDIA_KINDS
from .text import TextProcessor


# The part of a processor that reads each kind; Transformers calls the one of sounds by two names.
READERS = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
NOUNS = {"image": "images", "video": "videos", "audio": "sounds"}


def reader(processor: Any, kind: str) -> Any:
    """Return the part of a processor that reads a kind, `None` without one."""
    return next((found for name in READERS[kind] if (found := getattr(processor, name, None)) is not None), None)


def media_tokens(processor: Any) -> dict[str, str]:
    """Return, for each kind that a processor takes, the token that a chat template writes for one of it."""
    tokens = {
        kind: getattr(processor, f"{kind}_token", None) for kind in MEDIA_KINDS if reader(processor, kind) is not None
    }
    return {kind: token for kind, token in tokens.items() if token is not None}


def media_ids(processor: Any, config: Any = None) -> dict[str, set[int]]:
    """Return the ids that stand for each kind: those that the processor names, else those that the config does."""
    found: dict[str, set[int]] = {}
    for number, kind in enumerate(MEDIA_KINDS, 1):
        named = [*(getattr(processor, f"{kind}_token_ids", None) or []), getattr(processor, f"{kind}_token_id", None)]
        ids = {token for token in named if isinstance(token, int) and token >= 0}
        if not ids and config is not None and number in placeholder_ids(config):
            ids = placeholder_ids(config)[number]
        if ids:
            found[kind] = ids
    return found


def media_type_ids(input_ids: torch.Tensor, ids: Mapping[str, set[int]]) -> torch.Tensor:
    """Return the modality of every token: 0 text, 1 image, 2 video, 3 audio."""
    types = torch.zeros_like(input_ids)
    for number, kind in enumerate(MEDIA_KINDS, 1):
        types[torch.isin(input_ids, input_ids.new_tensor(sorted(ids.get(kind, ()))))] = number
    return types


def expands_alone(processor: Any) -> bool:
    """Tell whether a processor must see a medium to know how many placeholders it gets."""
    return not isinstance(processor, HfMoeProcessor | TextProcessor)


def refuse_kinds(processor: Any, counts: Mapping[str, int]) -> None:
    """Refuse what a processor does not take."""
    taken = media_tokens(processor)
    for kind, count in counts.items():
        if count and kind not in taken:
            others = " and ".join(NOUNS[other] for other in taken) or "nothing"
            taker = f"{type(processor).__name__} takes {others} beside text"
            raise ValueError(f"has {count} {NOUNS[kind]}, and {taker}: take another host, or rows without.")


def check_processor(processor: Any, config: Any) -> None:
    """Refuse a processor that does not belong to the host of a config.

    Its tokenizer has ids that the host has no embedding of, no placeholder, or one of another id than the host's.
    """
    tokenizer, name = processor.tokenizer, type(processor).__name__
    vocab_size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{name} does not fit the model: its tokenizer has ids up to {largest}, and the model embeddings for "
            f"{vocab_size}. Take the processor of this model, or resize the embeddings."
        )
    for kind, token in media_tokens(processor).items():
        own = tokenizer.convert_tokens_to_ids(token)
        if own is None or own == tokenizer.unk_token_id:
            raise ValueError(
                f"{name} does not fit its tokenizer, which has no token {token!r}, the placeholder of {NOUNS[kind]}: "
                "take the tokenizer of this processor."
            )
        ids = media_ids(processor).get(kind, {own}) | {own}
        wanted = placeholder_ids(config).get(MEDIA_KINDS.index(kind) + 1)
        if wanted is not None and not wanted & ids:
            theirs = ", ".join(map(str, sorted(wanted)))
            raise ValueError(
                f"{name} does not fit the model: {token!r} is the id {own} to its tokenizer, and the placeholder of "
                f"{NOUNS[kind]} is {theirs} to the model. Take the processor of this model."
            )
