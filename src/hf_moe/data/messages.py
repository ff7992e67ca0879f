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
PLACEHOLDER = "<image>"  # where an image stands in a text, as LLaVA and LLaMA-Factory write it
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")  # of an image part that brings its image
Message = dict[str, Any]

logger = logging.get_logger(__name__)


def text_of(value: Any, name: str) -> str:
    """Return a text as it is written; a number or a boolean is written as Python prints it.

    Raises:
        ValueError: if it is missing, or no text.
    """
    if isinstance(value, str):
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has a {name} that is no Unicode text ({error.reason}): {text!r:.100}.") from error
        return text
    if isinstance(value, Real | np.bool_) and value == value:
        return str(value)
    raise ValueError(f"has {name}={value!r:.100} of type {type(value).__name__}: write it as text.")


def from_json(value: Any, name: str) -> Any:
    """Return what a JSON text holds, and anything else as it is.

    Raises:
        ValueError: if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has the text {value!r:.100} as its {name}, which is not JSON ({error}).") from error


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
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


def read_messages(conversation: Any, num_images: int = 0, filled: bool = False) -> list[Message]:
    """Return messages of a role, a list of parts (`text`, or `image` without its source) and the fields beyond these.

    Accepts lists of `role` and `content` (a text, or parts), or of `from` and `value`, or their JSON text. Where no
    part is an image, each `<image>` in a text becomes one; without those the images are first in the first user turn.

    Args:
        num_images: that the row has beside its messages.
        filled: whether Arrow may have filled fields, see [`without_fill`]; those of JSON text are as written.

    Raises:
        ValueError: naming the message and what is wrong with it.
    """
    filled = filled and not isinstance(conversation, str)
    messages = [_read_message(message, index, filled) for index, message in enumerate(_turns(conversation))]
    if next((message["role"] for message in messages if message["role"] != "system"), None) == "assistant":
        raise ValueError("begins with an assistant turn, which nothing asks for: drop it, or put a user turn first.")
    if num_images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        _place_images(messages, num_images)
    return messages


def image_sources(conversation: Any, images: list[Any]) -> list[Any]:
    """Return the images of a conversation in the order of their places.

    Args:
        images: what the row has beside its messages, for the image parts that do not bring their own.

    Raises:
        ValueError: if these are not as many as such parts.
    """
    sources = [
        _source(part)
        for message in _turns(conversation)
        if isinstance(message, Mapping)
        for part in (message["content"] if isinstance(message.get("content"), list | tuple) else [])
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")
    ]
    brought = sum(source is not None for source in sources)
    if not brought:
        return images
    if len(sources) - brought != len(images):
        raise ValueError(
            f"has {len(sources)} image parts, {brought} of which bring their image, and {len(images)} images beside "
            "the messages: each image goes into its part, or into 'images' in the order of the other parts."
        )
    others = iter(images)
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
    return given(fields)


def _read_part(part: Any, role: str, index: int, filled: bool) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "image_url"):
        raise ValueError(
            f"has message {index} with the part {part!r:.100}. A content part is of type 'image' or 'text'."
        )
    if kind == "text":
        extra = _fields(part, ("type", "text"), filled)
        return {"type": "text", "text": text_of(part.get("text"), f"text of message {index}"), **extra}
    if role == "assistant":
        raise ValueError(f"has an image in message {index}, an assistant turn: a model of this library writes none.")
    if part.get("text"):
        raise ValueError(
            f"has message {index} with an image part that has text too: {part!r:.100}. Make it two parts."
        )
    return {"type": "image", **_fields(part, ("type", "text", *IMAGE_KEYS), filled)}


def _source(part: Mapping[str, Any]) -> Any:
    """Return the image that a part brings, `None` if it brings none."""
    given_keys = [name for name in IMAGE_KEYS if part.get(name) is not None]
    if len(given_keys) > 1:
        raise ValueError(f"has an image part with {' and '.join(given_keys)}: keep one of them.")
    if not given_keys:
        return None
    value = part[given_keys[0]]
    if given_keys[0] == "base64":
        return {"bytes": read_image({"base64": value})[1], "path": None}
    return value["url"] if given_keys[0] == "image_url" and isinstance(value, Mapping) else value


def _place_images(messages: list[Message], num_images: int) -> None:
    asked = [message for message in messages if message["role"] != "assistant"]
    if any(PLACEHOLDER in part["text"] for message in asked for part in message["content"]):
        for message in asked:
            message["content"] = [piece for part in message["content"] for piece in _split(part)]
        return
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": "image"}] * num_images + first["content"]


def _split(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a text's pieces, with an image part for every placeholder in it."""
    pieces: list[dict[str, Any]] = []
    for position, text in enumerate(part["text"].split(PLACEHOLDER)):
        pieces += [{"type": "image"}] if position else []
        pieces += [{**part, "text": text}] if text else []
    return pieces
