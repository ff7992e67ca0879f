"""Rows to batches: padded tokens, labels on the assistant's turns, images, videos, sounds or cached features."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from .chat_template import AnyProcessor
from .features import FeatureCache
from .host_features import HostFeatures
from .host_inputs import HostInputs
from .messages import MEDIUM_NAMES
from .placeholders import check_processor, expands_alone
from .row_images import open_row_images
from .rows import row_media, row_messages, row_named, template_options, unread_columns
from .tokenisation import (
    IGNORE_INDEX,
    ConversationTokenizer,
    Tokens,
    expand_placeholders,
    media_counts,
    pad_tokens,
    placeholder_counts,
    process_images,
    token_columns,
)


logger = logging.getLogger(__name__)

REMOVED_COLUMNS = "Trainer drops the columns that it does not know: set remove_unused_columns=False"


class VisionLanguageCollator:
    """Collate rows of `messages`, `images`, `videos` and `audios` for `Trainer` and TRL's `SFTTrainer`.

    The batch holds `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels`, each (B, S), the processor's
    tensors or `image_features` (N, P, C), and `<condition>_ids` (B,). A row may have any number of images, videos and
    sounds, none included. Training pads on the right; prompts (`train=False`) end in the generation prompt and pad on
    the left, without labels.

    Args:
        processor (`AnyProcessor`): an [`HfMoeProcessor`] with a chat template, the processor of a host of
            Transformers, or a [`TextProcessor`], for which nothing is said of modalities.
        max_length (`int`, *optional*): tokens per row, >= 1; what exceeds it is cut off, but never inside or before an
            image, a video or a sound.
        feature_cache (`FeatureCache` or `HostFeatures`, *optional*): features of a frozen tower, used in place of
            pixels.
        train (`bool`, *optional*, defaults to `True`): `False` for prompts.
        conditions (`Sequence[str]`, *optional*, defaults to `()`): names of what routers read of a row; rows then need
            the columns `<condition>_ids`.
        config (`PreTrainedConfig`, *optional*): of the model, to which the processor must belong; its placeholders
            tell modalities where the processor names none.

    Raises:
        ValueError: if the processor has no chat template, or does not belong to the model.
    """

    def __init__(
        self,
        processor: AnyProcessor,
        max_length: int | None = None,
        feature_cache: FeatureCache | HostFeatures | None = None,
        train: bool = True,
        conditions: Sequence[str] = (),
        config: PreTrainedConfig | None = None,
    ):
        if config is not None:
            check_processor(processor, config)
        self.processor = processor
        self.max_length = max_length
        self.feature_cache = feature_cache
        self.train = train
        self.conditions = conditions
        self.conversations = ConversationTokenizer(processor, train)
        self._condition_columns = [f"{name}_ids" for name in conditions]
        self._unread: set[str] = set()
        hosted = expands_alone(processor)
        self._host = HostInputs(processor, self.conversations, config, feature_cache) if hosted else None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch; an error names the first row that cannot be read, does not fit or has nothing to learn."""

        def named(index: int, step: Callable, *arguments: Any) -> Any:
            with row_named(rows[index], index, "batch"):
                return step(*arguments)

        for index, row in enumerate(rows):
            named(index, self._check_columns, row)
        batch = self._own_batch(rows, named) if self._host is None else self._host(rows, named, self._cut)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in self._condition_columns}

    def _own_batch(self, rows: list[dict[str, Any]], named: Callable) -> dict[str, torch.Tensor]:
        """Return the batch of a processor that needs not see an image to expand its placeholder."""
        read = [named(index, self._read, row) for index, row in enumerate(rows)]
        pictures = [picture for index, (images, _) in enumerate(read) for picture in named(index, self._open, images)]
        pixels: dict[str, Any] = process_images(pictures, self.processor) if self.feature_cache is None else {}
        if self.feature_cache is not None and pictures:
            pixels = {"image_features": torch.stack(pictures)}
        counts = placeholder_counts(sum(len(images) for images, _ in read), self.processor, pixels)

        batch: list[Tokens] = []
        for index, (row, (items, tokens)) in enumerate(zip(rows, read, strict=True)):
            own, counts = counts[: len(items)], counts[len(items) :]
            batch.append(named(index, self._fit, tokens, own, row.get("input_ids") is not None))
        result = pad_tokens(batch, self.processor.tokenizer, self.train)
        if self.processor.image_token is not None:
            is_image = result["input_ids"] == self.processor.image_token_id
            result["mm_token_type_ids"] = is_image.long() * result["attention_mask"]
        return result | pixels

    def _check_columns(self, row: dict[str, Any]) -> None:
        new = [name for name in unread_columns(row, self._condition_columns) if name not in self._unread]
        if new:
            self._unread.update(new)
            logger.warning("Training does not read the columns %s of the rows.", ", ".join(map(str, new)))
        missing = next((name for name in self._condition_columns if row.get(name) is None), None)
        if missing is not None:
            raise ValueError(f"lacks {missing!r}, which a router reads; it has {', '.join(row)}. {REMOVED_COLUMNS}.")
        if not row:
            raise ValueError(f"is empty. {REMOVED_COLUMNS}.")

    def _open(self, images: list[Any]) -> Sequence[Any]:
        """Return a row's images opened, or their features (N, P, C)."""
        if not images or self.processor.image_processor is None:
            return []
        cache = self.feature_cache
        return cache.lookup(images) if isinstance(cache, FeatureCache) else open_row_images(images)

    def _read(self, row: dict[str, Any]) -> tuple[list[Any], Tokens]:
        """Return the images of a row and its tokens, which a tokenised row has with all placeholders."""
        if row.get("input_ids") is not None:
            return row_media(row, "image"), token_columns(row, self.train)
        messages, counts = row_messages(row), media_counts(row)
        return row_media(row, "image"), self.conversations(messages, counts, template_options(row))

    def _fit(self, tokens: Tokens, counts: list[int], tokenised: bool) -> Tokens:
        """Return the tokens with all placeholders, none beyond `max_length`."""
        placeholder = self.processor.image_token_id
        input_ids, labels = tokens if tokenised else expand_placeholders(tokens, placeholder, counts)
        found = input_ids.count(placeholder)
        if found != sum(counts):
            remedy = "tokenise it again with the processor of this collator" if counts else REMOVED_COLUMNS
            wanted = f"{len(counts)} images of {sum(counts)} tokens"
            raise ValueError(f"has {found} placeholder tokens and {wanted}: {remedy}.")
        return self._cut((input_ids, labels), {"image": {placeholder}})

    def _cut(self, tokens: Tokens, placeholders: Mapping[str, set[int]]) -> Tokens:
        """Return the tokens up to `max_length`, in which every image, video and sound of the row still is."""
        input_ids, labels = tokens
        if self.max_length is not None and len(input_ids) > self.max_length:
            for kind, ids in placeholders.items():
                if not ids.isdisjoint(input_ids[self.max_length :]):
                    cut = f"max_length={self.max_length} would cut {MEDIUM_NAMES[kind]}: raise it or drop the row"
                    raise ValueError(f"has {len(input_ids)} tokens, and {cut}.")
            if not self.train:
                raise ValueError(f"has a prompt of {len(input_ids)} tokens, above max_length={self.max_length}.")
            input_ids, labels = (column[: self.max_length] for column in tokens)
        if self.train and all(label == IGNORE_INDEX for label in labels):
            raise ValueError(f"has no assistant token to learn from within {len(input_ids)} tokens.")
        return input_ids, labels
