"""Conversations to tokens and labels, for any chat template."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import PreTrainedTokenizerBase

from .chat_template import Answer, AnyProcessor, ChatTemplate, Conversation, Tokens
from .messages import MEDIA_KINDS, Message, read_messages
from .placeholders import expands_alone, media_ids, media_tokens, refuse_kinds
from .row_images import open_row_images, undecoded
from .rows import CONVERSATION_COLUMNS, row_media, row_messages, row_named, template_options
from .text import plain_messages


IGNORE_INDEX = -100
MAX_KNOWN = 65536


class ConversationTokenizer:
    """Tokenises conversations, with one placeholder per image and labels on the assistant's turns alone.

    An answer is learnt as it will be asked for: its ids come right after those of the prompt, as `apply_chat_template`
    gives them with `add_generation_prompt=True`, and end in one mark, the special token that closes the turn. The text
    of an answer is what the template's `{% generation %}` block holds, where it has one; else what the template writes
    after the generation prompt. Equal conversations are tokenised once.

    Args:
        processor (`AnyProcessor`): the processor; its tokenizer must be a fast one.
        train (`bool`, *optional*, defaults to `True`): with `False`, the last assistant turn is cut and replaced by
            the generation prompt, and nothing is labelled.
    """

    def __init__(self, processor: AnyProcessor, train: bool = True):
        if not processor.chat_template:
            raise ValueError("The processor has no chat template: set processor.chat_template.")
        if not processor.tokenizer.is_fast:
            name = type(processor.tokenizer).__name__
            raise ValueError(f"{name} knows no character offsets, which labels need: use a fast one.")
        self.template = ChatTemplate(processor)
        self.processor = processor
        self.train = train
        self.tokens_of_kinds = media_tokens(processor)
        self._media_ids = {token for ids in media_ids(processor).values() for token in ids}
        self._known: dict[str, Conversation] = {}

    def __call__(
        self, messages: list[Message], counts: Mapping[str, int], options: dict[str, Any] | None = None
    ) -> Tokens:
        """Return ids and labels of a conversation; each image, video and sound is one placeholder.

        Args:
            messages (`list[Message]`): in any of the forms of [`read_messages`].
            counts (`Mapping[str, int]`): how many of each kind the row has.
            options (`dict[str, Any]`, *optional*): for the chat template, such as `tools`.
        """
        conversation = self._remembered(messages, counts, options or {})
        tokens = conversation.tokens = conversation.tokens or self.tokenize(conversation)
        ids = self.processor.tokenizer.convert_tokens_to_ids
        self._check_places(counts, lambda token: tokens[0].count(ids(token)))
        return tokens

    def render(self, messages: list[Message], counts: Mapping[str, int], options: dict[str, Any]) -> Conversation:
        """Return a conversation as the chat template writes it, with a placeholder for each image, video and sound."""
        conversation = self._remembered(messages, counts, options)
        self._check_places(counts, conversation.text.count)
        return conversation

    def _check_places(self, counts: Mapping[str, int], count: Callable[[str], int]) -> None:
        for kind, token in self.tokens_of_kinds.items():
            found, wanted = count(token), counts.get(kind, 0)
            if found != wanted:
                places = f"has {found} {token} placeholders and {wanted} {kind}s"
                raise ValueError(f"{places}: write a part of type {kind!r} for each, which the chat template renders.")

    def _remembered(self, messages: list[Message], counts: Mapping[str, int], options: dict[str, Any]) -> Conversation:
        messages = read_messages(messages, counts)
        if not self.tokens_of_kinds:
            messages = plain_messages(messages)
        else:
            parts = Counter(part["type"] for message in messages for part in message["content"])
            refuse_kinds(self.processor, {kind: max(counts.get(kind, 0), parts[kind]) for kind in MEDIA_KINDS})
        try:
            key = json.dumps([messages, options])
        except (TypeError, ValueError) as error:
            raise ValueError(f"has a field that JSON does not know ({error}): write it as text.") from error
        if key not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = self._render(messages, options)
        return self._known[key]

    def _render(self, messages: list[Message], options: dict[str, Any]) -> Conversation:
        self.template.check_fields(messages, options)
        if not self.train:
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return Conversation(self.template.render(messages, options, add_generation_prompt=True), [], True)
        text, answers = self.template.answers(messages, options)
        return Conversation(text, answers, messages[-1]["role"] != "assistant")

    def tokenize(self, conversation: Conversation) -> Tokens:
        """Return the ids and labels of a conversation."""
        answers = conversation.answers
        input_ids: list[int] = []
        labels: list[int] = []
        end = 0
        for number, answer in enumerate(answers):
            asked = self.template.encode(answer.prompt)["input_ids"]
            if asked[: len(input_ids)] != input_ids:
                raise ValueError(
                    f"has {len(answers)} answers, and the tokens of answer {number - 1} change once more turns "
                    "follow: the chat template's generation prompt must not end in white space or within a word, "
                    "and no turn may be rendered differently later. Mend the template, or make a row of each answer."
                )
            is_last = number == len(answers) - 1 and not conversation.is_open
            learnt, marks = self._learn(asked, conversation.text, answer, is_last)
            labels += [IGNORE_INDEX] * (len(asked) - len(labels)) + marks
            input_ids, end = asked + learnt, answer.end
        if conversation.is_open or not answers:
            rest = self.template.encode(conversation.text)["input_ids"]
            if rest[: len(input_ids)] != input_ids:
                rest = input_ids + self.template.encode(conversation.text[end:])["input_ids"]
            input_ids, labels = rest, labels + [IGNORE_INDEX] * (len(rest) - len(labels))
        return input_ids, labels

    def _learn(self, asked: list[int], text: str, answer: Answer, is_last: bool) -> Tokens:
        """Return the ids that follow a prompt, and their labels."""
        start, known, encoded = 0, len(asked), self.template.encode(text[: answer.end])
        if encoded["input_ids"][:known] != asked:
            # The prompt's last token would merge with the answer, which generation cannot undo.
            start, known = len(answer.prompt), 0
            encoded = self.template.encode(text[start : answer.end])
        input_ids, offsets = encoded["input_ids"][known:], encoded["offset_mapping"][known:]
        labels = [IGNORE_INDEX] * len(input_ids)
        for position, (first, last) in enumerate(offsets):
            if any(first + start < stop and last + start > begin for begin, stop in answer.spans):
                labels[position] = input_ids[position]
        self._check_end(answer, input_ids, labels, is_last)
        return input_ids, labels

    def _check_end(self, answer: Answer, input_ids: list[int], labels: list[int], is_last: bool) -> None:
        """Give an answer the end that its template leaves out, and refuse one that has another number of ends."""
        tokenizer = self.processor.tokenizer
        place = f"has an answer (message {answer.index})"
        written = next((label for label in labels if label in self._media_ids), None)
        if written is not None:
            token = tokenizer.convert_ids_to_tokens(written)
            raise ValueError(f"{place} that writes {token}, the placeholder of an image, a video or a sound.")
        if not input_ids or labels[-1] not in self.template.special_ids:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"{place} that the chat template ends with no special token, and the tokenizer has no end of the "
                    "sequence: the model would never stop. Set tokenizer.eos_token."
                )
            if not is_last:
                raise ValueError(
                    f"{place} that the chat template ends with no special token although more turns follow: write one "
                    "after each answer, or make a row of each answer."
                )
            # A template that closes no turn would teach the model never to stop.
            input_ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        ends = {labels[-1], tokenizer.eos_token_id}
        if sum(label in ends for label in labels) != 1:
            written = tokenizer.convert_ids_to_tokens(sorted(ends - {None}))
            raise ValueError(f"{place} with an end mark ({', '.join(written)}) within its text: take it out.")


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


def pad_tokens(batch: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase, train: bool) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` (B, S), padded on the right; prompts left, without labels."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    side = "right" if train else "left"

    def stack(sequences: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, True, float(value), padding_side=side)

    result = {
        "input_ids": stack([ids for ids, _ in batch], pad_id),
        "attention_mask": stack([[1] * len(ids) for ids, _ in batch], 0),
    }
    return result | ({"labels": stack([labels for _, labels in batch], IGNORE_INDEX)} if train else {})


def token_columns(row: Mapping[str, Any], train: bool) -> Tokens:
    """Return the ids and labels of a row that has been tokenised, two lists of equally many integers."""
    columns = []
    for name in ("input_ids", "labels") if train else ("input_ids",):
        value: Any = row.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, list | tuple) or not value or not all(isinstance(token, int) for token in value):
            raise ValueError(f"has {name}={value!r:.100}: a tokenised row has lists of ids, as of `tokenize_rows`.")
        columns.append(list(value))
    if len(columns[0]) != len(columns[-1]):
        raise ValueError(f"has {len(columns[0])} input_ids and {len(columns[-1])} labels.")
    return columns[0], columns[-1]


def gives_packed_patches(processor: AnyProcessor) -> bool:
    """Tell whether images differ in their number of placeholders."""
    image_processor = getattr(processor, "image_processor", None)
    return image_processor is not None and "pixel_attention_mask" in image_processor.model_input_names


def process_images(images: list[Image.Image], processor: AnyProcessor) -> dict[str, Any]:
    """Return the image processor's tensors of opened images; no key without images, or without an image processor."""
    if not images or processor.image_processor is None:
        return {}
    return dict(processor.image_processor(images, return_tensors="pt"))


def placeholder_counts(num_images: int, processor: AnyProcessor, pixels: dict[str, Any]) -> list[int]:
    """Return the placeholders of every image."""
    if "pixel_attention_mask" in pixels:
        return pixels["pixel_attention_mask"].sum(-1).tolist()
    if num_images and processor.image_seq_length is None:
        raise ValueError("The processor has no image_seq_length: set it to the model config's.")
    return [processor.image_seq_length or 0] * num_images


def tokenize_rows(rows: Dataset | IterableDataset, processor: AnyProcessor) -> Dataset | IterableDataset:
    """Tokenise all rows before training; [`VisionLanguageCollator`] then only pads.

    `messages` is replaced by `input_ids` and `labels`, placeholders expanded; `images` are no longer decoded on access
    (the collator does, if it needs them). A host's own processor expands them by what it sees: its rows are checked
    and stay conversations, which the collator tokenises.

    Raises:
        ValueError: naming the row that cannot be tokenised.
    """
    rows = undecoded(rows)
    if expands_alone(processor):
        if isinstance(rows, Dataset):  # a stream is read once
            check_conversations(rows, processor)
        return rows
    tokenizer = ConversationTokenizer(processor)
    packed = gives_packed_patches(processor)

    def tokenize(row: dict[str, Any], index: int) -> dict[str, list[Any]]:
        with row_named(row, index, "dataset"):
            images = row_media(row, "image")
            tokens = tokenizer(row_messages(row), media_counts(row), template_options(row))
            pixels = process_images(open_row_images(images), processor) if packed else {}
        counts = placeholder_counts(len(images), processor, pixels)
        input_ids, labels = expand_placeholders(tokens, processor.image_token_id, counts)
        # Images of content parts would go with the messages.
        moved = {} if row.keys() & {"images", "image"} else {"images": images}
        return {"input_ids": input_ids, "labels": labels, **moved}

    options: dict[str, Any] = {}
    if isinstance(rows, Dataset):
        # Without a name for the result `datasets` hashes the tokenizer, which remembers what it has seen, and warns.
        options = {"desc": "Tokenising", "new_fingerprint": uuid4().hex}
    read = [name for name in CONVERSATION_COLUMNS if name in (rows.column_names or ())]
    return rows.map(tokenize, with_indices=True, remove_columns=read, **options)


def media_counts(row: Mapping[str, Any]) -> dict[str, int]:
    """Return how many of each kind a row has."""
    return {kind: len(row_media(row, kind)) for kind in MEDIA_KINDS}


def check_conversations(rows: Dataset | IterableDataset, processor: AnyProcessor, train: bool = True) -> None:
    """Tokenise the text of all rows and keep nothing; no picture is opened, and an error names the row."""
    tokenizer = ConversationTokenizer(processor, train)
    for index, row in enumerate(undecoded(rows)):
        with row_named(row, index, "dataset"):
            tokenizer(row_messages(row), media_counts(row), template_options(row))
