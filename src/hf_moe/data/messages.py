"""The forms in which a conversation may be written, and the one in which everything else reads it."""

import difflib
import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from transformers.utils import logging

from ..modeling.image_loading import read_image


ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
MEDIA_KINDS = ("image", "video", "audio")  # of what a row has beside text
# The mark of a medium in a text, as LLaVA and LLaMA-Factory write it.
PLACEHOLDERS = {kind: f"<{kind}>" for kind in MEDIA_KINDS}
# A part that brings its own has it under one of these keys, and these numbers about it.
SOURCE_KEYS = {kind: (kind, "url", "path", "base64", f"{kind}_url") for kind in MEDIA_KINDS}
SOURCE_NUMBERS = {"image": (), "video": ("fps",), "audio": ("sampling_rate",)}
PART_KINDS = {name: kind for kind in MEDIA_KINDS for name in (kind, f"{kind}_url")}
MEDIUM_NAMES = {"image": "an image", "video": "a video", "audio": "a sound"}
Message = dict[str, Any]

logger = logging.get_logger(__name__)


def text_of(value: Any, name: str) -> str:
    """Return a text as it is written; a number or a boolean is written as Python prints it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has a {name} that is no Unicode text ({error.reason}): {value!r:.100}.") from error
        return str(value)
    if isinstance(value, Real | np.bool_) and value == value:
        return str(value)
    raise ValueError(f"has {name}={value!r:.100} of type {type(value).__name__}: write it as text.")


def from_json(value: Any, name: str) -> Any:
    """Return what a JSON text holds, and anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has the text {value!r:.100} as its {name}, which is not JSON ({error}).") from error


def stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something."""
    said = {name: value for name, value in fields.items() if value is not None}
    return {name: value for name, value in said.items() if not isinstance(value, str | list | dict) or value}


def without_fill(value: Any, name: str) -> Any:
    """Return a value of a table without what Arrow fills in: `None`, for the keys that only other rows have.

    A null that is meant looks the same, so it is announced that nulls are left out.
    """
    kept = _without_none(value)
    if kept != value:
        logger.warning_once(
            f"Nulls within {name} are left out, because a table holds them for the keys that only other rows have. "
            "Where null is meant, write the column as JSON text."
        )
    return kept


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def read_messages(conversation: Any, counts: Mapping[str, int] | None = None, filled: bool = False) -> list[Message]:
    """Return messages of a role, a list of parts (`text`, or `image`, `video`, `audio` without its source) and the
    fields beyond these.

    Accepts lists of `role` and `content` (a text, or parts), or of `from` and `value`, or their JSON text. Where no
    part is an image, each `<image>` in a text becomes one; without those the images are first in the first user turn.
    So do `<video>` and `<audio>`; images come before videos, and those before sounds.

    Args:
        counts (`Mapping[str, int]`, *optional*): how many of each kind the row has beside its messages.
        filled (`bool`, *optional*, defaults to `False`): whether Arrow may have filled fields, see [`without_fill`];
            those of JSON text are as written.
    """
    filled = filled and not isinstance(conversation, str)
    messages = [_read_message(message, index, filled) for index, message in enumerate(_turns(conversation))]
    if next((message["role"] for message in messages if message["role"] != "system"), None) == "assistant":
        raise ValueError("begins with an assistant turn, which nothing asks for: drop it, or put a user turn first.")
    counts = counts or {}
    for kind in reversed(MEDIA_KINDS):
        if counts.get(kind) and not any(part["type"] == kind for message in messages for part in message["content"]):
            _place(messages, kind, counts[kind])
    return messages


def part_sources(conversation: Any, kind: str, beside: list[Any]) -> list[Any]:
    """Return what a conversation has of a kind, in the order of the places.

    The parts that do not bring their own have what the row has `beside` its messages, as many as there are.
    """
    sources = [
        _source(part, kind)
        for message in _turns(conversation)
        if isinstance(message, Mapping)
        for part in (message["content"] if isinstance(message.get("content"), list | tuple) else [])
        if isinstance(part, Mapping) and PART_KINDS.get(str(part.get("type"))) == kind
    ]
    brought = sum(source is not None for source in sources)
    if not brought:
        return beside
    if len(sources) - brought != len(beside):
        raise ValueError(
            f"has {len(sources)} {kind} parts, {brought} of which bring their {kind}, and {len(beside)} {kind}s "
            f"beside the messages: each {kind} goes into its part, or into '{kind}s' in the order of the other parts."
        )
    others = iter(beside)
    return [next(others) if source is None else source for source in sources]


def _turns(conversation: Any) -> list[Any]:
    conversation = from_json(conversation, "messages")
    if isinstance(conversation, np.ndarray):
        conversation = conversation.tolist()
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(f"has no list 'messages' of turns, but {conversation!r:.100}.")
    return list(conversation)


def _read_message(message: Any, index: int, filled: bool) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"has message {index} = {message!r:.100}: a message is an object of 'role' and 'content'.")
    fields = _fields(message, ("content", "value"), filled)
    if "from" in fields and "role" not in fields:
        role, allowed, content = fields.pop("from"), tuple(SPEAKERS), message.get("value")
    else:
        role, allowed, content = fields.pop("role", None), ROLES, message.get("content")
    if role is None or (content is None and not (role == "assistant" and fields.get("tool_calls"))):
        raise ValueError(f"has message {index} = {message!r:.100}: a message needs 'role' and 'content'.")
    if role not in allowed:
        close = difflib.get_close_matches(str(role).lower(), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"has message {index} of the role {role!r}; roles are {', '.join(allowed)}.{hint}")
    if isinstance(content, list | tuple) and not content and not fields.get("tool_calls"):
        raise ValueError(f"has message {index} without a content part: an empty content is the text ''.")
    parts = [] if content is None else content
    if not isinstance(parts, list | tuple | np.ndarray):
        parts = [{"type": "text", "text": text_of(parts, f"content of message {index}")}]
    role = SPEAKERS.get(role, role)
    return {"role": role, "content": [_read_part(part, role, index, filled) for part in parts], **fields}


def _fields(holder: Mapping[str, Any], others: tuple[str, ...], filled: bool) -> dict[str, Any]:
    """Return the fields of a message or a part beyond `others`."""
    fields = {name: value for name, value in holder.items() if name not in others}
    if filled:
        fields = {name: without_fill(value, f"the {name} of messages") for name, value in fields.items()}
    return stated(fields)


def _read_part(part: Any, role: str, index: int, filled: bool) -> dict[str, Any]:
    type_ = part.get("type") if isinstance(part, Mapping) else None
    if type_ == "text":
        extra = _fields(part, ("type", "text"), filled)
        return {"type": "text", "text": text_of(part.get("text"), f"text of message {index}"), **extra}
    kind = PART_KINDS.get(str(type_))
    if kind is None:
        known = "'text', 'image', 'video' or 'audio'"
        raise ValueError(f"has message {index} with the part {part!r:.100}: a part is of type {known}.")
    if role == "assistant":
        raise ValueError(f"has {MEDIUM_NAMES[kind]} in message {index}, an assistant turn: models here write none.")
    if part.get("text"):
        raise ValueError(f"has message {index} with a part of two, {kind} and text: {part!r:.100}. Make it two parts.")
    return {"type": kind, **_fields(part, ("type", "text", *SOURCE_KEYS[kind], *SOURCE_NUMBERS[kind]), filled)}


def _source(part: Mapping[str, Any], kind: str) -> Any:
    """Return what a part brings, `None` if it brings nothing."""
    given_keys = [name for name in SOURCE_KEYS[kind] if part.get(name) is not None]
    if len(given_keys) > 1:
        article = "a" if kind == "video" else "an"
        raise ValueError(f"has {article} {kind} part with {' and '.join(given_keys)}: keep one of them.")
    numbers = {name: part[name] for name in SOURCE_NUMBERS[kind] if part.get(name) is not None}
    if not given_keys:
        if numbers:
            found = f"has a {kind} part with {', '.join(numbers)} and no {kind}"
            raise ValueError(f"{found}: give both in the part, or both in '{kind}s'.")
        return None
    (key,) = given_keys
    value = part[key]
    if key == "base64":
        value = {"bytes": read_image({"base64": value})[1], "path": None}
    elif key == f"{kind}_url" and isinstance(value, Mapping):
        value = value["url"]
    if not numbers:
        return value
    held = {name: item for name, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
    return {**(held or {kind: value}), **numbers}


def _place(messages: list[Message], kind: str, count: int) -> None:
    """Give the places to what the messages say nothing of."""
    asked = [message for message in messages if message["role"] != "assistant"]
    if any(PLACEHOLDERS[kind] in part.get("text", "") for message in asked for part in message["content"]):
        for message in asked:
            message["content"] = [piece for part in message["content"] for piece in _split(part, kind)]
        return
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": kind}] * count + first["content"]


def _split(part: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return a text's pieces, with a part for every placeholder in it."""
    if part["type"] != "text":
        return [part]
    pieces: list[dict[str, Any]] = []
    for position, text in enumerate(part["text"].split(PLACEHOLDERS[kind])):
        pieces += [{"type": kind}] if position else []
        pieces += [{**part, "text": text}] if text else []
    return pieces
