"""The row format: `messages` beside `images`, as TRL and the Hub use it."""

from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage


MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
ROW_FEATURES = Features({"messages": MESSAGES, "images": List(Image())})


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


IMAGE_PART: dict[str, Any] = {"type": "image", "text": None}


def question_messages(question: str, answer: str) -> list[dict[str, Any]]:
    """Return one turn: the image, the question, the answer."""
    return [
        {"role": "user", "content": [IMAGE_PART, text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


def row_images(row: dict[str, Any]) -> list[Any]:
    """Return the images of a row, not decoded; a single `image` counts as a list of one."""
    if row.get("images") is not None:
        return list(row["images"])
    return [row["image"]] if row.get("image") is not None else []


def normalise_messages(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Return messages whose content is a list of parts, without the empty fields that Arrow adds.

    Plain-string content becomes one text part. Where no message says where its images stand, they stand first in the
    first user message.

    Raises:
        ValueError: if a message has no role or no content, or a part has an unknown type.
    """
    result = []
    for message in messages:
        if not message.get("role") or message.get("content") is None:
            raise ValueError(f"A message needs 'role' and 'content', got {message!r}.")
        parts = message["content"]
        parts = [text_part(parts)] if isinstance(parts, str) else parts
        for part in parts:
            if part.get("type") not in ("image", "text"):
                raise ValueError(f"A content part is of type 'image' or 'text', got {part!r}.")
        parts = [{name: value for name, value in part.items() if value is not None} for part in parts]
        result.append({"role": message["role"], "content": parts})
    placed = sum(part["type"] == "image" for message in result for part in message["content"])
    first = next((message for message in result if message["role"] == "user"), None)
    if num_images and not placed and first is not None:
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    return result


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows with images as paths or bytes, so that reading a row decodes nothing."""
    records = {"images": List(Image(decode=False)), "image": Image(decode=False)}
    for name in records.keys() & set(rows.column_names or ()):
        rows = rows.cast_column(name, records[name])
    return rows


def open_image(image: Any) -> PILImage.Image:
    """Return an RGB image from a decoded one, a path, or the undecoded record of `datasets`."""
    if isinstance(image, str):
        image = PILImage.open(image)
    elif isinstance(image, dict):
        image = Image().decode_example(image)
    return image.convert("RGB")


def describe_row(row: dict[str, Any], index: int, place: str) -> str:
    """Return how an error names a row: its position, and its id where it has one."""
    name = next((row[key] for key in ("id", "image_id") if row.get(key) is not None), None)
    return f"Row {index} of the {place}" + (f" (id {name!r})" if name is not None else "")
