"""Batches for the hosts of Transformers: their own processors make them, of the tokens that are learnt here."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedConfig, ProcessorMixin

from .chat_template import Conversation
from .messages import MEDIA_KINDS
from .placeholders import media_ids, media_type_ids, reader
from .row_images import open_row_images, readable
from .rows import row_media, row_messages, template_options
from .sounds import open_sound
from .tokenisation import ConversationTokenizer, Tokens, pad_tokens
from .videos import open_video


PRIVATE_USE = range(0xE000, 0xF8FF)  # characters that Unicode leaves to private use
SOUND_MASKS = ("feature_attention_mask", "input_features_mask")
Cut = Callable[[Tokens, Mapping[str, set[int]]], Tokens]


@dataclass
class HostRow:
    """A row with its images, videos and sounds opened."""

    conversation: Conversation
    images: list[Any]
    videos: list[Any]
    sounds: list[np.ndarray]


class HostInputs:
    """What a host's processor makes of a batch of rows.

    The processor expands placeholders, by what it sees, and computes all that goes with the tokens; which tokens these
    are, and which of them are learnt, says the [`ConversationTokenizer`]. So what is learnt is what will be asked for,
    and placeholders, types and masks are the host's own. Features come in place of the pixels of images and videos.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        conversations: ConversationTokenizer,
        config: PreTrainedConfig | None = None,
        features: Any = None,
    ):
        self.features = features
        self.processor = processor
        self.conversations = conversations
        self.media_ids = media_ids(processor, config)
        parameters = inspect.signature(type(processor).__call__).parameters
        self._sounds_name = "audios" if "audios" in parameters and "audio" not in parameters else "audio"

    def __call__(self, rows: list[dict[str, Any]], named: Callable, cut: Cut) -> dict[str, Any]:
        """Return the batch; `named` takes a step of a row, given by its number, and names the row in errors."""
        read = [named(index, self._read, row) for index, row in enumerate(rows)]
        seen = next((index for index, row in enumerate(read) if row.videos), None)
        if seen is not None and any(row.images for row in read):
            named(seen, self._refuse_shared)
        ours: list[Exception] = []

        def tokenize(index: int, conversation: Conversation) -> Tokens:
            try:
                return named(index, lambda: cut(self.conversations.tokenize(conversation), self.media_ids))
            except ValueError as error:
                ours.append(error)
                raise

        try:
            batch = self._process(read, tokenize)
        except Exception as error:
            if error in ours:
                raise
            # The processor does not know whose fault it is.
            for index, row in enumerate(read):
                named(index, self._alone, row)
            raise ValueError(f"{self._fault(error)}, for these {len(rows)} rows together, not alone.") from error
        frames = self._sound_frames(batch, sum(len(row.sounds) for row in read))
        for index, row in enumerate(read):
            lengths, frames = frames[: len(row.sounds)], frames[len(row.sounds) :]
            if lengths:
                named(index, self._check_whole, row, lengths)
        return batch if self.features is None else self.features.replace(read, named, batch)

    def _sound_frames(self, batch: dict[str, torch.Tensor], count: int) -> list[int]:
        """Return the frames of each sound's features, where the processor tells them in a mask of a row per sound."""
        if not count or not hasattr(reader(self.processor, "audio"), "hop_length"):
            return []
        masks = [value for name, value in batch.items() if name in SOUND_MASKS and value.shape[:-1] == (count,)]
        return masks[0].sum(-1).tolist() if masks else []

    def _read(self, row: dict[str, Any]) -> HostRow:
        if row.get("input_ids") is not None:
            name = type(self.processor).__name__
            raise ValueError(f"is tokenised, and {name} expands placeholders itself: leave 'messages' in the row.")
        media = {kind: row_media(row, kind) for kind in MEDIA_KINDS}
        counts = {kind: len(items) for kind, items in media.items()}
        conversation = self.conversations.render(row_messages(row), counts, template_options(row))
        return HostRow(conversation, *(self.open(kind, media[kind]) for kind in MEDIA_KINDS))

    def open(self, kind: str, items: list[Any]) -> list[Any]:
        """Return images, videos (frames and their times) or sounds of a row, opened for the processor."""
        if kind == "image":
            return open_row_images(items)
        opened: list[Any] = []
        for position, item in enumerate(items):
            with readable("video" if kind == "video" else "sound", position):
                if kind == "video":
                    opened.append(open_video(item, reader(self.processor, kind)))
                else:
                    opened.append(open_sound(item, reader(self.processor, kind).sampling_rate))
        return opened

    def _alone(self, row: HostRow) -> None:
        try:
            self._process([row], lambda index, conversation: self.conversations.tokenize(conversation))
        except Exception as error:
            raise ValueError(self._fault(error)) from error

    def _fault(self, error: Exception) -> str:
        return f"is not taken by {type(self.processor).__name__}: {type(error).__name__}: {error}"

    def _process(
        self, rows: list[HostRow], tokenize: Callable[[int, Conversation], Tokens]
    ) -> dict[str, torch.Tensor]:
        texts = [row.conversation.text for row in rows]
        mark = next(chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in texts))
        tokens: list[Tokens] = []

        def expanded(marked: list[str]) -> list[Tokens]:
            conversations = [row.conversation.expanded(text, mark) for row, text in zip(rows, marked, strict=True)]
            tokens[:] = [tokenize(index, conversation) for index, conversation in enumerate(conversations)]
            return tokens

        processor = copy.copy(self.processor)
        processor.tokenizer = _RowTokenizer(self.processor.tokenizer, mark, expanded, self.conversations.train)
        marked = [row.conversation.marked(mark) for row in rows]
        batch = processor(text=marked, return_tensors="pt", **self._media(rows))
        result = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        result |= pad_tokens(tokens, self.processor.tokenizer, self.conversations.train)
        if "mm_token_type_ids" not in result:
            result["mm_token_type_ids"] = media_type_ids(result["input_ids"], self.media_ids)
        return result

    def _refuse_shared(self) -> None:
        """Refuse videos beside images where the processor gives both under one name, so that one would be lost."""
        names = [getattr(reader(self.processor, kind), "model_input_names", []) for kind in ("image", "video")]
        shared = ", ".join(sorted(set(names[0]) & set(names[1])))
        if shared:
            raise ValueError(
                f"has videos in a batch with images, which {type(self.processor).__name__} gives under one name "
                f"({shared}): train on rows of one kind, or give the frames as images."
            )

    def _check_whole(self, row: HostRow, lengths: list[int]) -> None:
        """Refuse a sound of which the feature extractor has left out the end; `lengths` are in frames."""
        extractor = reader(self.processor, "audio")
        for position, (sound, length) in enumerate(zip(row.sounds, lengths, strict=True)):
            if (length + 1) * extractor.hop_length < len(sound):
                rate = extractor.sampling_rate
                raise ValueError(
                    f"has a sound {position} of {len(sound) / rate:.2f} s, of which {type(extractor).__name__} reads "
                    f"{length * extractor.hop_length / rate:.2f} s: cut the sound, or make several of it."
                )

    def _media(self, rows: list[HostRow]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if any(row.images for row in rows):
            given["images"] = [row.images for row in rows]
        videos = [video for row in rows for video in row.videos]
        if videos:
            given["videos"] = [frames for frames, _ in videos]
            # Frames have been picked where their rate is known.
            given["videos_kwargs"] = {"video_metadata": [known for _, known in videos], "do_sample_frames": False}
        sounds = [sound for row in rows for sound in row.sounds]
        if sounds:
            given[self._sounds_name] = sounds
            given["audio_kwargs"] = {"sampling_rate": reader(self.processor, "audio").sampling_rate}
        return given


class _RowTokenizer:
    """Stands in for the tokenizer of a processor: texts with the mark get the ids that `tokenize` gives their rows."""

    def __init__(self, tokenizer: Any, mark: str, tokenize: Callable[[list[str]], list[Tokens]], train: bool):
        self._tokenizer = tokenizer
        self._mark = mark
        self._tokenize = tokenize
        self._train = train

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(text, list) or not all(isinstance(item, str) and self._mark in item for item in text):
            return self._tokenizer(text, *args, **kwargs)
        padded = pad_tokens(self._tokenize(text), self._tokenizer, self._train)
        columns = {name: padded[name] for name in ("input_ids", "attention_mask")}
        if kwargs.get("return_tensors") is None:
            columns = {name: value.tolist() for name, value in columns.items()}
        # Some processors ask for the token of a character.
        return BatchEncoding(columns, encoding=self._tokenizer(text).encodings)
