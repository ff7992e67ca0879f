"""The row format: `messages` beside `images`, `videos` and `audios`, as TRL and the Hub use it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value

from .messages import MEDIA_KINDS, from_json, part_sources, read_messages, stated, text_of, without_fill


MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
ROW_FEATURES = Features({"messages": MESSAGES, "images": List(Image())})

OPTION_COLUMNS = ("tools", "chat_template_kwargs")
CONVERSATION_COLUMNS = ("messages", "conversations", "question", *OPTION_COLUMNS)
TOKENISED_COLUMNS = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
MEDIA_COLUMNS = tuple(name for kind in MEDIA_KINDS for name in (f"{kind}s", kind))  # several, or one
OTHER_COLUMNS = (*MEDIA_COLUMNS, "id", "image_id", "answer", "answers", "question_type")
KNOWN_COLUMNS = {*CONVERSATION_COLUMNS, *TOKENISED_COLUMNS, *OTHER_COLUMNS}
# A column with one of these words in its name asks something of training that is not done.
ASKING_WORDS = {
    "weight", "weights", "train", "loss", "mask", "masks", "prefix", "reward", "system", "reasoning", "thinking",
    "tool", "function", "functions", "video", "videos", "audio", "audios", "documents",
}  # fmt: skip


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


IMAGE_PART: dict[str, Any] = {"type": "image", "text": None}


def question_messages(question: str, answer: str, num_images: int = 1) -> list[dict[str, Any]]:
    """Return one turn: the images, the question, the answer."""
    return [
        {"role": "user", "content": [IMAGE_PART] * num_images + [text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


def row_messages(row: Mapping[str, Any], filled: bool = True) -> list[dict[str, Any]]:
    """Return the messages of a row as [`read_messages`] does, `filled` where it may come from an Arrow table."""
    conversation = _conversation(row)
    counts = {kind: len(_beside(row, kind)) for kind in MEDIA_KINDS}
    if conversation is not None:
        return read_messages(conversation, counts, filled)
    if row.get("question") is None or row.get("answer") is None:
        names = ", ".join(map(str, row)) or "of nothing"
        raise ValueError(
            f"has the columns {names}, and no conversation: a row has a list 'messages' (of role and content) or "
            "'conversations' (of from and value), or a 'question' and an 'answer'."
        )
    question, answer = text_of(row["question"], "question"), text_of(row["answer"], "answer")
    return read_messages(question_messages(question, answer, 0), counts)


def row_media(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Return what a row has of a kind in the order of the places, not decoded.

    Images are in `images` (a list, or one), in `image` (one), or in the image parts of the messages; `videos` and
    `audios` likewise.
    """
    conversation = _conversation(row)
    beside = _beside(row, kind)
    return beside if conversation is None else part_sources(conversation, kind, beside)


def template_options(row: Mapping[str, Any], filled: bool = True) -> dict[str, Any]:
    """Return what a row hands to the chat template: `chat_template_kwargs`, an object, and `tools`, a list of them."""
    found = {name: from_json(row.get(name), name) for name in OPTION_COLUMNS}
    if filled:  # what is JSON text is as it was written
        found = {
            name: value if isinstance(row.get(name), str) else without_fill(value, f"the {name}")
            for name, value in found.items()
        }
    found = stated(found)
    options, tools = found.get("chat_template_kwargs", {}), found.get("tools")
    if not isinstance(options, dict):
        raise ValueError(f"has chat_template_kwargs={options!r:.100}: they are an object of names and values.")
    if tools is None:
        return options
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"has tools={tools!r:.100}: they are a list of JSON schemas.")
    return {**options, "tools": tools}


def unread_columns(row: Mapping[str, Any], others: Collection[str] = ()) -> list[str]:
    """Return the columns that neither training nor the caller (`others`) reads; refuse those that ask something."""
    unread = []
    _check_mapping(row)
    tokenised = row.get("input_ids") is not None
    for name, value in row.items():
        if value is not None and name in TOKENISED_COLUMNS and not tokenised:
            raise ValueError(f"has {name} and no input_ids: a row has both, or messages.")
        if value is None or name in KNOWN_COLUMNS or name in others or str(name).endswith("_ids"):
            continue
        if ASKING_WORDS & set(str(name).lower().split("_")):
            raise ValueError(
                f"has {name}={value!r:.100}, which training would ignore: put it into the messages, or drop the "
                "column (`ignore` of a source, `remove_columns` of a dataset)."
            )
        unread.append(name)
    return unread


def _check_mapping(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"is {row!r:.100}: a row is an object with 'messages'.")


def _conversation(row: Any) -> Any:
    _check_mapping(row)
    forms = [row[name] for name in ("messages", "conversations") if row.get(name) is not None]
    if len(forms) > 1:
        raise ValueError("has both 'messages' and 'conversations': keep one of them.")
    return forms[0] if forms else None


def _beside(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Return what the columns of a kind hold."""
    names = [name for name in (f"{kind}s", kind) if row.get(name) is not None]
    names = [name for name in names if not (isinstance(row[name], list | tuple) and not row[name])]
    if len(names) > 1:
        raise ValueError(f"has both '{kind}s' and '{kind}': keep one of them.")
    if not names:
        return []
    value = row[names[0]]
    found = _several_images(value) if kind == "image" else _several(value, kind, alone=names[0] == kind)
    missing = next((index for index, item in enumerate(found) if item is None), None)
    if missing is not None:
        raise ValueError(f"has no {kind} {missing} among its {len(found)} {kind}s: it is null.")
    return found


def _several_images(value: Any) -> list[Any]:
    several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object)
    images = list(value) if several or getattr(value, "ndim", 0) == 4 else [value]
    return [image for item in images for image in (item if isinstance(item, list | tuple) else [item])]


def _several(value: Any, kind: str, alone: bool) -> list[Any]:
    """Return videos or sounds as a list; in the column of one, a list of frames or of samples is one."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value)
    if dimensions := getattr(value, "ndim", 0):  # an array; a sound has one or two dimensions, a video four
        return list(value) if dimensions > (4 if kind == "video" else 2) else [value]
    if not isinstance(value, list | tuple):
        return [value]
    is_samples = kind == "audio" and isinstance(value[0], int | float)
    return [value] if is_samples or (alone and kind == "video") else list(value)


def describe_row(row: Any, index: int, place: str) -> str:
    """Return how an error names a row: its position, and its id where it has one."""
    columns = row if isinstance(row, Mapping) else {}
    ids = (columns.get(key) for key in ("id", "image_id"))
    # A row without pictures has no image's id.
    name = next((found for found in ids if found is not None and not (isinstance(found, list) and not found)), None)
    return f"Row {index} of the {place}" + (f" (id {name!r})" if name is not None else "")


@contextmanager
def row_named(row: Any, index: int, place: str) -> Iterator[None]:
    """Name a row in the errors of what is done with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{describe_row(row, index, place)} {error}") from error
