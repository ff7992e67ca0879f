"""Conversations to tokens and labels, for any chat template."""

import json
import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils.chat_template_utils import render_jinja_template

from ..modeling.processing_hf_moe import HfMoeProcessor
from .rows import describe_row, normalise_messages, open_image, row_images, undecoded
from .text import TextProcessor, plain_messages


IGNORE_INDEX = -100
MAX_KNOWN = 65536
AnyProcessor = HfMoeProcessor | TextProcessor
Tokens = tuple[list[int], list[int]]


class ConversationTokenizer:
    """Tokenises conversations, with one placeholder per image and labels on the assistant's turns alone.

    The labels of a turn begin where the generation prompt ends and hold the token that closes the turn. They come from
    the template's own `{% generation %}` block where it has one; otherwise the conversation is rendered up to before
    and after every assistant turn, and the difference is the turn. Equal conversations are tokenised once.

    Args:
        processor: the processor; its tokenizer must be a fast one.
        train: with `False`, the last assistant turn is cut and replaced by the generation prompt, and nothing is
            labelled.

    Raises:
        ValueError: if the processor has no chat template, or its tokenizer knows no offsets.
    """

    def __init__(self, processor: AnyProcessor, train: bool = True):
        if not processor.chat_template:
            raise ValueError("The processor has no chat template: set processor.chat_template.")
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} knows no character offsets, which labels need: use a fast one."
            )
        self.processor = processor
        self.train = train
        specials = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        self._closing = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._known: dict[str, Tokens] = {}

    def __call__(self, messages: list[dict[str, Any]], num_images: int) -> Tokens:
        """Return ids and labels of a conversation; each image is one placeholder.

        Raises:
            ValueError: if the placeholders are not as many as the images, or the template changes earlier turns.
        """
        messages = normalise_messages(messages, num_images)
        if self.processor.image_token is None:
            messages = plain_messages(messages)
        conversation = json.dumps(messages)
        if conversation not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[conversation] = self._tokenize(messages)
        input_ids, labels = self._known[conversation]
        found = input_ids.count(self.processor.image_token_id)
        if found != num_images:
            raise ValueError(
                f"has {found} {self.processor.image_token} placeholders and {num_images} images: write one content "
                "part of type 'image' per image, and let the chat template render it."
            )
        return input_ids, labels

    def _tokenize(self, messages: list[dict[str, Any]]) -> Tokens:
        if not self.train:
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            input_ids = self._encode(self._render(messages, add_generation_prompt=True))["input_ids"]
            return input_ids, [IGNORE_INDEX] * len(input_ids)
        text, spans = self._spans(messages)
        encoded = self._encode(text)
        input_ids = encoded["input_ids"]
        labels = [IGNORE_INDEX] * len(input_ids)
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            if any(start < last and end > first for first, last in spans):
                labels[position] = input_ids[position]
        tokenizer = self.processor.tokenizer
        ends_open = messages[-1]["role"] == "assistant" and labels[-1] not in tokenizer.added_tokens_decoder
        if ends_open and tokenizer.eos_token_id is not None:
            # A template that closes no turn would teach the model never to stop.
            input_ids, labels = input_ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]
        return input_ids, labels

    def _encode(self, text: str) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        # The rule of ProcessorMixin.apply_chat_template: what generation sees is what was trained.
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def _spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered conversation and the characters of its assistant turns."""
        template = self.processor.chat_template
        template = template if isinstance(template, str) else template["default"]
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.processor.tokenizer.special_tokens_map,
            )
            text, marked = rendered[0][0], rendered[1][0]
            return text, [(start, self._close(text, end)) for start, end in marked]
        text = self._render(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], add_generation_prompt=True) if index else ""
            turn = self._render(messages[: index + 1])
            start = len(commonprefix([prompt, turn]))
            if not text.startswith(turn.rstrip()) or (spans and start < spans[-1][1]):
                raise ValueError(
                    f"has an assistant turn (message {index}) that the chat template renders differently once more "
                    "turns follow: mark it in the template with {% generation %} ... {% endgeneration %}."
                )
            spans.append((start, self._trim(turn)))
        return text, spans

    def _close(self, text: str, end: int) -> int:
        """Return the end of a turn, with the special token that follows it."""
        closing = self._closing.match(text, end)
        return closing.end() if closing else end

    def _trim(self, turn: str) -> int:
        """Return the end of a turn without the white space that follows the special token closing it."""
        closings = [match.end() for match in self._closing.finditer(turn)]
        return closings[-1] if closings and not turn[closings[-1] :].strip() else len(turn)


def expand_placeholders(tokens: Tokens, placeholder: int, counts: Sequence[int]) -> Tokens:
    """Repeat the i-th placeholder `counts[i]` times."""
    remaining = iter(counts)
    input_ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(*tokens, strict=True):
        times = next(remaining) if token == placeholder else 1
        input_ids += [token] * times
        labels += [label] * times
    return input_ids, labels


def takes_packed_patches(processor: AnyProcessor) -> bool:
    """Tell whether images differ in their number of placeholders."""
    image_processor = processor.image_processor
    return image_processor is not None and "pixel_attention_mask" in image_processor.model_input_names


def process_images(images: list[Any], processor: AnyProcessor) -> dict[str, Any]:
    """Return the image processor's tensors; no key without images, or without an image processor."""
    if not images or processor.image_processor is None:
        return {}
    return dict(processor.image_processor([open_image(image) for image in images], return_tensors="pt"))


def placeholder_counts(num_images: int, processor: AnyProcessor, pixels: dict[str, Any]) -> list[int]:
    """Return the placeholders of every image.

    Raises:
        ValueError: if the processor does not know them.
    """
    if "pixel_attention_mask" in pixels:
        return pixels["pixel_attention_mask"].sum(-1).tolist()
    if num_images and processor.image_seq_length is None:
        raise ValueError("The processor has no image_seq_length: set it to the model config's.")
    return [processor.image_seq_length or 0] * num_images


def tokenize_rows(
    rows: Dataset | IterableDataset, processor: AnyProcessor, train: bool = True
) -> Dataset | IterableDataset:
    """Tokenise all rows before training; [`VisionLanguageCollator`] then only pads.

    `messages` is replaced by `input_ids` and `labels`, placeholders expanded; `images` are no longer decoded on access
    (the collator does, if it needs them).

    Raises:
        ValueError: naming the row that cannot be tokenised.
    """
    tokenizer = ConversationTokenizer(processor, train)
    rows = undecoded(rows)
    packed = takes_packed_patches(processor)

    def tokenize(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        images = row_images(row)
        try:
            tokens = tokenizer(row["messages"], len(images))
        except ValueError as error:
            raise ValueError(f"{describe_row(row, index, 'dataset')} {error}") from error
        pixels = process_images(images, processor) if packed else {}
        counts = placeholder_counts(len(images), processor, pixels)
        input_ids, labels = expand_placeholders(tokens, processor.image_token_id, counts)
        return {"input_ids": input_ids, "labels": labels}

    options = {} if isinstance(rows, IterableDataset) else {"desc": "Tokenising"}
    return rows.map(tokenize, with_indices=True, remove_columns=["messages"], **options)
