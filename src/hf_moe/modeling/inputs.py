"""What a call is given: its tokens' modalities and mask, and whether its arguments fit each other and the model.

Values are read where that costs nothing, on the CPU and outside of a compiled graph; types and shapes are always.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import logging

from ..configuration.configuration_hf_moe import MODALITIES
from .memory import cache_of, cached_tokens, foreign_state
from .routing import Router


logger = logging.get_logger(__name__)


def check_placeholders(config) -> None:
    """Refuse placeholder ids that no token can have, and a tower without one."""
    vocab_size = config.text_config.vocab_size
    if config.vision_config is not None and config.image_token_id is None:
        raise ValueError("image_token_id is None, and there is a vision tower: set it to the id of the images' token.")
    for modality in MODALITIES[1:]:
        token_id = getattr(config, f"{modality}_token_id")
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{modality}_token_id={token_id} is no token of the decoder, whose vocab_size is {vocab_size}: add it "
                "to the tokenizer, and resize the decoder's embeddings before the MoE is built."
            )


def learned_positions(language_model: nn.Module) -> int | None:
    """Return how many positions a decoder has embeddings for, `None` where positions are computed."""
    limit = getattr(language_model.config, "max_position_embeddings", None)
    tokens = language_model.get_input_embeddings()
    tables = [child for child in language_model.children() if isinstance(child, nn.Embedding) and child is not tokens]
    # OPT's kin keep two rows more than they have positions.
    return limit if any(limit in (table.num_embeddings, table.num_embeddings - 2) for table in tables) else None


def real_tokens(config, inputs: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Return which of the `tokens` (B, S, ...) are real, (B, S) bool; `None` where the mask of the call does not tell.

    A mask of two dimensions covers the cached tokens too, and free places of a cache of fixed size. In one of four,
    padding is attended by nobody, itself included.
    """
    batch, positions = tokens.shape[:2]
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    if isinstance(mask, Mapping):  # one for each kind of layers
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or list(mask)
        mask = mask.get(kinds[0])
    dimensions = mask.dim() if isinstance(mask, torch.Tensor) else 0
    if dimensions == 2:
        start = first_column(inputs, mask, positions)
        return mask[:, start : start + positions].to(tokens.device).bool()
    if mask is None or (dimensions == 4 and positions == 1):  # what is decoded is real
        return torch.ones(batch, positions, dtype=torch.bool, device=tokens.device)
    if dimensions != 4 or mask.shape[2] != positions or torch.compiler.is_compiling():
        return None
    offset = 0 if cache is None else int(cached_tokens(cache) - cache.get_mask_sizes(positions, 0)[1])
    itself = mask.diagonal(offset, dim1=-2, dim2=-1)  # (B or 1, heads or 1, S)
    if itself.shape[-1] != positions:
        return None
    attended = itself > torch.finfo(itself.dtype).min / 2 if itself.is_floating_point() else itself.bool()
    return attended.any(1).to(tokens.device).expand(batch, positions)


def hides_rows(inputs: Mapping[str, Any]) -> bool:
    """Whether a mask keeps from whoever reads whole rows what is padding, or a document of its own.

    Of four dimensions are those that a user has made, of packed rows say, and those that `generate` makes for a cache
    of fixed size, which tell.
    """
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    two = isinstance(mask, torch.Tensor) and mask.dim() == 2
    return mask is not None and not two and (cache is None or not cache.is_compileable)


def first_column(inputs: Mapping[str, Any], mask: torch.Tensor, length: int) -> int:
    """Return where in a mask (B, columns) of all tokens so far the `length` tokens of the call begin."""
    cache, others = cache_of(inputs), mask.shape[1] - length
    if others < 0 or (others > 0 and cache is None and foreign_state(inputs) is None):
        raise ValueError(
            f"The attention_mask has {mask.shape[1]} columns and the call {length} tokens, "
            + ("one column for each is needed." if others < 0 else "but no cache of earlier ones that was found.")
            + f" Pass the mask of these tokens, or the cache that holds the others; got {given(mask)}."
        )
    # A cache of fixed size may have free places behind the tokens.
    return min(int(cached_tokens(cache)), others) if cache is not None and cache.is_compileable else others


class ModalityUnknown(ValueError):
    """What tells the modality of the tokens is missing; the message says what would."""


def placeholder_ids(config) -> dict[int, set[int]]:
    """Return the placeholders that a config names, or a config of a part: the modality's number -> ids of tokens."""
    found: dict[int, set[int]] = {}
    for part in _with_parts(config):
        for number, name in enumerate(MODALITIES[1:], start=1):
            ids = {getattr(part, f"{name}_token_{kind}", None) for kind in ("index", "id")}
            ids = {token_id for token_id in ids if isinstance(token_id, int)}
            if ids:
                found.setdefault(number, set()).update(ids)
    return found


def _with_parts(config) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)


def find_placeholder(
    model: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_id: int
) -> torch.Tensor:
    """Return where the placeholder of this id is, (B, S) bool: by the token, or by its embedding."""
    if input_ids is not None:
        return input_ids == token_id
    table = model.get_input_embeddings()
    if token_id >= table.num_embeddings:
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    placeholder = torch.tensor(token_id, device=inputs_embeds.device)
    return (inputs_embeds == table(placeholder)).all(-1)


TELL = (
    "pass mm_token_type_ids (0 text, 1 image, 2 video, 3 audio), or choose a router that does not read the modality."
)


def modality_ids(config, find: Callable[[int], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return the modalities of `tokens` (B, S, ...) by their placeholders, (B, S).

    Raises:
        ModalityUnknown: if the config names one placeholder for several modalities, and a token is such.
    """
    placeholders = placeholder_ids(config)
    counts = Counter(token_id for ids in placeholders.values() for token_id in ids)
    found = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    for modality, ids in placeholders.items():
        for token_id in ids:
            here = find(token_id)
            if counts[token_id] > 1 and bool(here.any()):
                raise ModalityUnknown(
                    "The modality of the tokens is unknown: the config has one placeholder for several modalities, "
                    f"{ {MODALITIES[number]: sorted(ids) for number, ids in placeholders.items()} }, and the call has "
                    f"such tokens: {TELL}"
                )
            found = found.masked_fill(here, modality)
    return found


def modalities_of(model: Any, inputs: Mapping[str, Any], tokens: torch.Tensor, others: bool = False) -> torch.Tensor:
    """Return the modalities of the `tokens` (B, S, ...) of a call, (B, S): those that are given, or by placeholders.

    Args:
        model: what is called.
        inputs: of the call, by name.
        others (`bool`, *optional*, defaults to `False`): whether others may have put images among the tokens, in a
            model that we did not build. Then neither embeddings tell nor a config without placeholders.

    Raises:
        ModalityUnknown: if neither tells.
    """
    # Ernie's own count the tokens around an image to it.
    for name in ("moe_mm_token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            return inputs[name][:, -tokens.shape[1] :].long()
    config, input_ids, inputs_embeds = model.config, inputs.get("input_ids"), inputs.get("inputs_embeds")
    if others and input_ids is None:
        raise ModalityUnknown(
            f"The modality of the tokens is unknown: inputs_embeds do not tell which of them are images: {TELL}"
        )
    text = config.get_text_config(decoder=True)
    if others and not placeholder_ids(config) and any(part not in (config, text) for part in _with_parts(config)):
        raise ModalityUnknown(
            "The modality of the tokens is unknown: the config names no image_token_id, video_token_id or "
            f"audio_token_id, and the model is more than a decoder of text: {TELL}"
        )
    return modality_ids(config, partial(find_placeholder, model, input_ids, inputs_embeds), tokens)


def vocabulary(config) -> int:
    """Return how many tokens there are; some hosts have placeholders beyond those of their decoder."""
    text = config.get_text_config(decoder=True)
    words = text.vocab_size + (getattr(text, "additional_vocab_size", None) or 0)
    return max([words, *(token_id + 1 for ids in placeholder_ids(config).values() for token_id in ids)])


def check_tokens(config, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Check the tokens of a call, and return what was given of the two: exactly one must be."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        check_integers("input_ids", input_ids, None, "tokens")
        _check_range("input_ids", input_ids, 0, vocabulary(config), "the decoder's vocab_size")
    else:
        width = config.get_text_config(decoder=True).hidden_size
        floating = isinstance(inputs_embeds, torch.Tensor) and inputs_embeds.is_floating_point()
        if not floating or inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
            raise ValueError(
                f"inputs_embeds must be floating point of the shape (rows, tokens, {width}), got "
                f"{given(inputs_embeds)}."
            )
    return inputs_embeds if input_ids is None else input_ids


def check_labels(config, tokens: torch.Tensor, labels: Any) -> None:
    """Check the labels of `tokens` (B, S, ...)."""
    check_integers("labels", labels, tuple(tokens.shape[:2]), "tokens")
    limit = "the decoder's vocab_size, and -100 where masked"
    _check_range("labels", labels, 0, vocabulary(config), limit, masked=-100)


def conditions_read(routers: Iterable[Router]) -> dict[str, int]:
    """Return the conditions that routers read, and how many ids they tell apart; 0 for features."""
    read: dict[str, int] = {}
    for router in routers:
        if router.condition is not None:
            read[router.condition] = max(read.get(router.condition, 0), router.num_conditions)
    return read


def check_condition_ids(name: str, ids: torch.Tensor, number: int) -> None:
    """Refuse ids that no router knows."""
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"The ids of the condition {name!r} must be integers, not {ids.dtype}.")
    if ids.numel() and int(ids.max()) >= number:
        raise ValueError(
            f"The ids of the condition {name!r} must be less than {number}, which a router knows, and one is "
            f"{int(ids.max())}."
        )


def check_ids(tokens: torch.Tensor, mm_token_type_ids: Any, condition_ids: Any, read: dict[str, int]) -> None:
    """Check the modality and condition ids of `tokens` (B, S, ...); `read` is what [`conditions_read`] returns."""
    shape = tuple(tokens.shape[:2])
    if mm_token_type_ids is not None:
        check_modality_ids(mm_token_type_ids, shape)
    if condition_ids is None:
        return
    if not isinstance(condition_ids, Mapping):
        raise ValueError(
            f"condition_ids must be a dict of ids by the name of a condition, got {given(condition_ids)}."
        )
    for name, ids in condition_ids.items():
        label, known = f"condition_ids[{name!r}]", read.get(name)
        if known == 0:
            if not isinstance(ids, torch.Tensor) or ids.dim() not in (2, 3) or len(ids) != shape[0]:
                raise ValueError(
                    f"{label} must hold features (B, C) of the {shape[0]} rows or (B, S, C) of their tokens, got "
                    f"{given(ids)}."
                )
            continue
        by_token = isinstance(ids, torch.Tensor) and ids.dim() == 2
        check_integers(label, ids, (shape[0], ids.shape[1]) if by_token else shape[:1], "rows")
        _check_range(label, ids, 0, known, "the ids that a router knows")


def check_modality_ids(ids: Any, shape: tuple[int, int]) -> None:
    """Refuse what are no modality ids of tokens of this shape."""
    check_integers("mm_token_type_ids", ids, shape, "tokens")
    _check_range("mm_token_type_ids", ids, 0, len(MODALITIES), f"the modalities {', '.join(MODALITIES)}")


def check_mask_and_positions(
    tokens: torch.Tensor, attention_mask: Any, position_ids: Any, cache: Cache | None, max_positions: int | None
) -> None:
    """Check the mask and the positions of a call, whose `tokens` (B, S, ...) follow those of the `cache`."""
    batch, positions = tokens.shape[:2]
    seen = cache.get_seq_length() if cache is not None and not torch.compiler.is_compiling() else 0
    length = positions + seen if isinstance(seen, int) else None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        _check_2d_mask(attention_mask, batch, length)
    if position_ids is not None:
        # Those of several dimensions, as of images, are fractions in some hosts.
        given_positions = isinstance(position_ids, torch.Tensor) and position_ids.dim() >= 1
        whole = given_positions and not (position_ids.dim() < 3 and position_ids.is_floating_point())
        if not whole or position_ids.shape[-1] != positions:
            raise ValueError(
                f"position_ids must be integers, one for each of the {positions} tokens, got {given(position_ids)}."
            )
        _check_range("position_ids", position_ids, 0, max_positions, "the decoder's max_position_embeddings")
    elif max_positions is not None and length is not None and length > max_positions:
        raise ValueError(
            f"The rows are {length} tokens long, and the decoder has {max_positions} positions "
            "(max_position_embeddings): shorten them."
        )


def check_mask(attention_mask: Any, tokens: torch.Tensor) -> None:
    """Refuse what is no mask of `tokens` (B, S, ...): a tensor of 2 or 4 dimensions, a dict of such, or flex's own."""
    if isinstance(attention_mask, Mapping) and attention_mask:
        for mask in attention_mask.values():
            check_mask(mask, tokens)
    elif isinstance(attention_mask, torch.Tensor):
        batch, positions = tokens.shape[:2]
        if attention_mask.dim() not in (2, 4):
            raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {given(attention_mask)}.")
        fits = attention_mask.shape[-1] >= positions and attention_mask.shape[0] in (1, batch)
        if not fits or (attention_mask.dim() == 4 and attention_mask.shape[2] not in (1, positions)):
            raise ValueError(
                f"attention_mask must cover {batch} rows of {positions} tokens, those in the cache included, got "
                f"{given(attention_mask)}."
            )
    elif attention_mask is not None and type(attention_mask).__name__ != "BlockMask":
        raise ValueError(f"attention_mask must be a tensor (rows, tokens), got {given(attention_mask)}.")


def _check_2d_mask(mask: torch.Tensor, batch: int, length: int | None) -> None:
    if mask.shape[0] != batch or (length is not None and mask.shape[1] != length):
        raise ValueError(
            f"attention_mask must have the shape ({batch}, {length or 'tokens'}) of the tokens, those in the cache "
            f"included, got {given(mask)}."
        )
    if readable(mask) and mask.numel() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask must hold 1 for tokens and 0 for padding, got {mask.unique()[:5].tolist()}.")


def encoded_images(mm_encoder_outputs: Any) -> Any:
    """Return the images among the outputs of encoders, `None` where there are none."""
    unknown = set(mm_encoder_outputs or {}) - {"image"}
    if unknown:
        raise ValueError(f"mm_encoder_outputs may hold 'image', got {sorted(unknown)}.")
    return (mm_encoder_outputs or {}).get("image")


def miss_images(config, input_ids: torch.Tensor | None, cache: Cache | None, refuse: bool) -> None:
    """Look for placeholders among tokens without images, nothing before them: they would be read as a word.

    Args:
        refuse: whether the call trains or generates, where that would be an answer to nothing. A bare forward is told.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.device.type == "meta" or torch.compiler.is_compiling():
        return
    if cache is not None and cache.get_seq_length():
        return
    # Read on every device, as the placeholders of a call with images are: once, before the first token.
    count = int((input_ids == config.image_token_id).sum())
    if not count:
        return
    message = (
        f"Image features and image tokens do not match: {count} placeholder tokens in the text, no images: pass "
        "pixel_values or image_features."
    )
    if refuse:
        raise ValueError(message)
    logger.warning_once(f"{message} Here the placeholders are read as words.")


def check_integers(name: str, value: Any, shape: tuple[int, ...] | None, of: str) -> None:
    """Refuse what is no tensor of integers, or of another shape than `shape`, two dimensions where that is `None`."""
    integers = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    if not integers or (value.dim() != 2 if shape is None else tuple(value.shape) != shape):
        form = "(rows, tokens)" if shape is None else f"{shape} of the {of}"
        raise ValueError(f"{name} must have the shape {form} and hold integers, got {given(value)}.")


def _check_range(
    name: str, value: torch.Tensor, low: int, high: int | None, limit: str, masked: int | None = None
) -> None:
    if not readable(value) or not value.numel():
        return
    wrong = (value < low) if high is None else (value < low) | (value >= high)
    wrong = wrong if masked is None else wrong & (value != masked)
    if wrong.any():
        allowed = f"{low} or more" if high is None else f"{low} to {high - 1} ({limit})"
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} must be {allowed}, got {int(value[where])} at {where}.")


def readable(value: torch.Tensor) -> bool:
    """Whether the values of a tensor may be read: that costs nothing on the CPU, outside of a compiled graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def given(value: Any) -> str:
    """Describe a value in an error."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of the shape {tuple(value.shape)}"
