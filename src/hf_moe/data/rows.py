"""The row format: `messages` beside `images`, as TRL and the Hub use it."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value

from .messages import from_json, given, image_sources, read_messages, text_of, without_fill


MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
ROW_FEATURES = Features({"messages": MESSAGES, "images": List(Image())})

OPTION_COLUMNS = ("tools", "chat_template_kwargs")
CONVERSATION_COLUMNS = ("messages", "conversations", "question", *OPTION_COLUMNS)
TOKENISED_COLUMNS = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
OTHER_COLUMNS = ("image", "images", "id", "image_id", "answer", "answers", "question_type")
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
    """Return the messages of a row as [`read_messages`] does, from whichever form the row has.

    Args:
        filled: whether the row may come from an Arrow table.

    Raises:
        ValueError: if the row holds no conversation, or one of no accepted form.
    """
    conversation = _conversation(row)
    num_images = len(_images_beside(row))
    if conversation is not None:
        return read_messages(conversation, num_images, filled)
    if row.get("question") is None or row.get("answer") is None:
        raise ValueError(
            f"has the columns {', '.join(map(str, row)) or 'of nothing'}, and no conversation: a row has a list "
            "'messages' (of role and content), a list 'conversations' (of from and value), or a 'question' and an "
            "'answer'."
        )
    question, answer = text_of(row["question"], "question"), text_of(row["answer"], "answer")
    return read_messages(question_messages(question, answer, 0), num_images)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row in the order of their places, not decoded.

    They are in `images` (a list, or one), in `image` (one), or in the image parts of the messages.

    Raises:
        ValueError: if the image parts that bring no image are not as many as the images beside the messages.
    """
    conversation = _conversation(row)
    images = _images_beside(row)
    return images if conversation is None else image_sources(conversation, images)


def template_options(row: Mapping[str, Any], filled: bool = True) -> dict[str, Any]:
    """Return what a row hands to the chat template beside its messages.

    Args:
        filled: whether the row may come from an Arrow table.

    Raises:
        ValueError: if `tools` is not a list of objects or `chat_template_kwargs` not an object, or the JSON of one.
    """
    found = {}
    for name in OPTION_COLUMNS:
        value = row.get(name)
        found[name] = without_fill(value, f"the {name}") if filled else value
        if isinstance(value, str):
            found[name] = from_json(value, name)
    found = given(found)
    options, tools = found.get("chat_template_kwargs", {}), found.get("tools")
    if not isinstance(options, dict):
        raise ValueError(f"has chat_template_kwargs={options!r:.100}: they are an object of names and values.")
    if tools is None:
        return options
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"has tools={tools!r:.100}: they are a list of JSON schemas.")
    return {**options, "tools": tools}


def unread_columns(row: Mapping[str, Any], others: Collection[str] = ()) -> list[str]:
    """Return the columns of a row that nothing reads.

    Args:
        others: columns that the caller reads.

    Raises:
        ValueError: if one of them asks something of training.
    """
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


def _images_beside(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of the columns."""
    found = [row[name] for name in ("images", "image") if row.get(name) is not None]
    found = [value for value in found if not (isinstance(value, list | tuple) and not value)]
    if len(found) > 1:
        raise ValueError("has both 'images' and 'image': keep one of them.")
    if not found:
        return []
    several = isinstance(found[0], list | tuple) or (isinstance(found[0], np.ndarray) and found[0].dtype == object)
    images = list(found[0]) if several or getattr(found[0], "ndim", 0) == 4 else found
    images = [image for item in images for image in (item if isinstance(item, list | tuple) else [item])]
    missing = next((index for index, image in enumerate(images) if image is None), None)
    if missing is not None:
        raise ValueError(f"has no image {missing} among its {len(images)} images: it is null.")
    return images


def describe_row(row: Any, index: int, place: str) -> str:
    """Return how an error names a row: its position, and its id where it has one."""
    columns = row if isinstance(row, Mapping) else {}
    ids = (columns.get(key) for key in ("id", "image_id"))
    # A row without pictures has no image's id.
    name = next((found for found in ids if found is not None and not (isinstance(found, list) and not found)), None)
    return f"Row {index} of the {place}" + (f" (id {name!r})" if name is not None else "")
