"""Rows to batches: padded tokens, labels on the assistant's turns, images or their cached features."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .chat_template import AnyProcessor
from .features import FeatureCache
from .pictures import open_row_images
from .rows import describe_row, row_images, row_messages, template_options, unread_columns
from .tokenisation import (
    IGNORE_INDEX,
    ConversationTokenizer,
    Tokens,
    expand_placeholders,
    placeholder_counts,
    process_images,
    token_columns,
)


logger = logging.getLogger(__name__)

REMOVED_COLUMNS = "Trainer drops the columns that it does not know: set remove_unused_columns=False"


class VisionLanguageCollator:
    """Collate rows of `messages` and `images` for `Trainer` and TRL's `SFTTrainer`.

    The batch holds `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels`, each (B, S), the image processor's
    tensors or `image_features` (N, P, C), and `<condition>_ids` (B,). A row may have any number of images, none
    included. Training pads on the right; prompts (`train=False`) end in the generation prompt and pad on the left,
    without labels.

    Args:
        processor: an [`HfMoeProcessor`] with a chat template, or a [`TextProcessor`], for which nothing is said of
            modalities.
        max_length: tokens per row, >= 1; what exceeds it is cut off, but never inside or before an image.
        feature_cache: features of a frozen tower, used in place of pixels.
        train: `False` for prompts.
        conditions: names of what routers read of a row; rows then need the columns `<condition>_ids`.
    """

    def __init__(
        self,
        processor: AnyProcessor,
        max_length: int | None = None,
        feature_cache: FeatureCache | None = None,
        train: bool = True,
        conditions: Sequence[str] = (),
    ):
        self.processor = processor
        self.max_length = max_length
        self.feature_cache = feature_cache
        self.train = train
        self.conditions = conditions
        self.conversations = ConversationTokenizer(processor, train)
        self._condition_columns = [f"{name}_ids" for name in conditions]
        self._unread: set[str] = set()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch.

        Raises:
            ValueError: naming the first row with an image that cannot be opened or is not in the cache, whose
                placeholders do not match its images, whose image would be cut, or which has nothing to learn from.
        """
        read = [self._row(index, row, self._read, row) for index, row in enumerate(rows)]
        images = [items for items, _ in read]
        pictures = [self._row(index, row, self._pictures, images[index]) for index, row in enumerate(rows)]
        pixels = self._pixels([picture for items in pictures for picture in items])
        counts = placeholder_counts(sum(map(len, images)), self.processor, pixels)

        batch = []
        for index, (row, (items, tokens)) in enumerate(zip(rows, read, strict=True)):
            own, counts = counts[: len(items)], counts[len(items) :]
            batch.append(self._row(index, row, self._fit, tokens, own, row.get("input_ids") is not None))
        conditions = {name: torch.tensor([row[name] for row in rows]) for name in self._condition_columns}
        return self._pad(batch) | pixels | conditions

    def _row(self, index: int, row: Any, step: Callable, *arguments: Any) -> Any:
        """Take a step of one row, whose name goes before what is wrong with it."""
        try:
            return step(*arguments)
        except ValueError as error:
            raise ValueError(f"{describe_row(row, index, 'batch')} {error}") from error

    def _pictures(self, images: list[Any]) -> Sequence[Any]:
        """Return a row's images opened, or their features (N, P, C)."""
        if not images or self.processor.image_processor is None:
            return []
        return open_row_images(images) if self.feature_cache is None else self.feature_cache.lookup(images)

    def _pixels(self, pictures: list[Any]) -> dict[str, torch.Tensor]:
        if self.feature_cache is None:
            return process_images(pictures, self.processor)
        return {"image_features": torch.stack(pictures)} if pictures else {}

    def _read(self, row: dict[str, Any]) -> tuple[list[Any], Tokens]:
        """Return the images of a row and its tokens, which a tokenised row has with all placeholders."""
        new = [name for name in unread_columns(row, self._condition_columns) if name not in self._unread]
        if new:
            self._unread.update(new)
            logger.warning("Training does not read the columns %s of the rows.", ", ".join(map(str, new)))
        missing = next((name for name in self._condition_columns if row.get(name) is None), None)
        if missing is not None:
            raise ValueError(f"lacks {missing!r}, which a router reads; it has {', '.join(row)}. {REMOVED_COLUMNS}.")
        if not row:
            raise ValueError(f"is empty. {REMOVED_COLUMNS}.")
        if row.get("input_ids") is not None:
            return row_images(row), token_columns(row, self.train)
        messages, images = row_messages(row), row_images(row)
        return images, self.conversations(messages, len(images), template_options(row))

    def _fit(self, tokens: Tokens, counts: list[int], tokenised: bool) -> Tokens:
        """Return the tokens with all placeholders, none beyond `max_length`."""
        placeholder = self.processor.image_token_id
        input_ids, labels = tokens if tokenised else expand_placeholders(tokens, placeholder, counts)
        found = input_ids.count(placeholder)
        if found != sum(counts):
            remedy = "tokenise it again with the processor of this collator" if counts else REMOVED_COLUMNS
            raise ValueError(
                f"has {found} placeholder tokens and {len(counts)} images of {sum(counts)} tokens: {remedy}."
            )
        if self.max_length is not None and len(input_ids) > self.max_length:
            if placeholder in input_ids[self.max_length :]:
                raise ValueError(
                    f"has {len(input_ids)} tokens, and max_length={self.max_length} would cut an image: "
                    "raise max_length or drop the row."
                )
            if not self.train:
                raise ValueError(f"has a prompt of {len(input_ids)} tokens, above max_length={self.max_length}.")
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if self.train and all(label == IGNORE_INDEX for label in labels):
            raise ValueError(f"has no assistant token to learn from within {len(input_ids)} tokens.")
        return input_ids, labels

    def _pad(self, batch: list[Tokens]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        side = "right" if self.train else "left"

        def stack(sequences: list[list[int]], value: int) -> torch.Tensor:
            tensors = [torch.tensor(sequence) for sequence in sequences]
            return torch.nn.utils.rnn.pad_sequence(tensors, True, float(value), padding_side=side)

        input_ids = stack([ids for ids, _ in batch], pad_id)  # (B, S)
        attention_mask = stack([[1] * len(ids) for ids, _ in batch], 0)
        result = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
        }
        if self.processor.image_token is not None:
            result["mm_token_type_ids"] = (input_ids == self.processor.image_token_id).long() * attention_mask
        if self.train:
            result["labels"] = stack([labels for _, labels in batch], IGNORE_INDEX)
        return result
