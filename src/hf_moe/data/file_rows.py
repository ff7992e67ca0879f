"""Rows of files as datasets: conversations in one form, image paths relative to the file, all columns of all rows."""

import base64
import binascii
import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from .files import ROW_ERRORS, plain, read_records
from .messages import from_json, text_of
from .rows import MESSAGES, row_images, row_messages, template_options


TEXT_COLUMNS = ("question", "answer", "question_type", "id")
READ_COLUMNS = ("messages", "conversations", "images", "image")


def rows_of_file(file: Path) -> Dataset:
    """Return the rows of a file of JSON lines, JSON, CSV, Parquet or Arrow.

    Raises:
        FileNotFoundError: if the file, or an image of a row, is not there.
        ValueError: naming the row that is not of an accepted form.
    """
    rows = ((index, read_row(row, index, str(file), file.parent)) for index, row in read_records(file))
    return as_dataset(rows, str(file))


def rows_of_list(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return rows in memory as [`rows_of_file`] returns those of a file; paths are relative to the working folder.

    Raises:
        FileNotFoundError: if an image of a row is not there.
        ValueError: naming the row that is not of an accepted form, or if there is none.
    """
    if not rows:
        raise ValueError("The list holds no rows.")
    read = ((index, read_row(row, index, "the list", Path())) for index, row in enumerate(rows))
    return as_dataset(read, "the list")


def as_dataset(rows: Iterable[tuple[int, dict[str, Any]]], place: str) -> Dataset:
    """Return rows as a dataset that has all of their columns; a row has `None` in those that it lacks.

    Args:
        rows: and their numbers.
        place: where they come from.

    Raises:
        ValueError: if the values of a column are of several types, naming column and row.
    """
    numbers, records = zip(*rows, strict=True)
    names = list(dict.fromkeys(name for row in records for name in row))
    if len({type(row.get("image_id")) for row in records}) > 1:  # some rows name their images themselves
        for row in records:
            row["image_id"] = row["image_id"] if isinstance(row["image_id"], list) else [row["image_id"]]
    columns = {name: [row.get(name) for row in records] for name in names}
    features = {"images": List(Image())}
    if any(has_fields(messages) for messages in columns["messages"]):
        # Fields that only some messages have are of many types, which one Arrow column does not hold.
        columns["messages"] = [json.dumps(messages) for messages in columns["messages"]]
    else:
        features["messages"] = MESSAGES
        columns["messages"] = [[_filled(message) for message in messages] for messages in columns["messages"]]
    for name in names:
        if name in ("tools", "chat_template_kwargs"):
            columns[name] = [
                value if value is None or isinstance(value, str) else json.dumps(value) for value in columns[name]
            ]
        if name not in features and name != "messages":
            _check_types(name, columns[name], numbers, place)
    texts = {name: Value("string") for name in ("messages", *TEXT_COLUMNS) if name in columns and name not in features}
    inferred = Dataset.from_dict({name: columns[name] for name in names if name not in {**features, **texts}}).features
    order = {**features, **texts, **inferred}
    return Dataset.from_dict(columns, features=Features({name: order[name] for name in names}))


def has_fields(messages: list[dict[str, Any]]) -> bool:
    """Tell whether messages hold more than roles and parts of type and text."""
    return any(
        message.keys() - {"role", "content"} or any(part.keys() - {"type", "text"} for part in message["content"])
        for message in messages
    )


def _filled(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"text": None, **part} for part in message["content"]]}


def _check_types(name: str, values: list[Any], numbers: tuple[int, ...], place: str) -> None:
    try:
        pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError):
        first = next(value for value in values if value is not None)
        for number, value in zip(numbers, values, strict=True):
            try:
                pa.array([first, value])
            except (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError) as error:
                raise ValueError(
                    f"Row {number} of {place} has {name}={value!r:.60}, and a row before it {name}={first!r:.60}: "
                    "a column is of one type in all rows."
                ) from error
        raise ValueError(f"The column {name!r} of {place} is not of one type in all rows.") from None


def read_row(row: Any, index: int, place: str, folder: Path) -> dict[str, Any]:
    """Return a row with its messages and images in one form.

    Args:
        row: as [`read_records`] gives it, or any other.
        index: of the row in its file.
        place: where the row comes from, for errors.
        folder: from which the paths of images start.

    Raises:
        FileNotFoundError: if an image is not there.
        ValueError: naming the row, if it is not of an accepted form.
    """
    try:
        return _row(row, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Row {index} of {place} {error}") from error
    except ROW_ERRORS as error:
        raise ValueError(f"Row {index} of {place} {error}") from error


def _row(row: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"is {row!r:.100}: a row is an object with 'messages'.")
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("images", "messages", "conversations"):
        if str(row.get(name)).startswith("["):  # a list in a cell
            row[name] = from_json(row[name], name)
    messages, sources = plain(row_messages(row)), row_images(row)
    template_options(plain(row))  # so that a fault is found here
    others = {name: plain(value) for name, value in row.items() if name not in READ_COLUMNS}
    texts: dict[str, Any] = {name: text_of(row[name], name) for name in TEXT_COLUMNS if name in row}
    for name in ("answers", "image_id"):
        if name in row:
            values = from_json(row[name], name) if str(row[name]).startswith("[") else row[name]
            several = isinstance(values, list)
            texts[name] = [text_of(value, name) for value in values] if several else text_of(values, name)
    if isinstance(texts.get("answers"), str):
        texts["answers"] = [texts["answers"]]
    images = [_image(source, folder) for source in sources]
    return {
        "image_id": [_name(source) for source in sources],
        **others,
        **texts,
        "messages": messages,
        "images": images,
    }


def _name(source: Any) -> str:
    """Return the name of an image: as the row writes it, or made of its bytes."""
    if isinstance(source, str) and not source.startswith("data:"):
        return str(source)
    content = source if isinstance(source, bytes) else pickle.dumps(source)
    return hashlib.sha256(content).hexdigest()


def _image(source: Any, folder: Path) -> Any:
    """Return an image as `datasets` keeps it: a path, or bytes."""
    if isinstance(source, dict) and source.get("bytes") is None and source.get("path") is not None:
        source = source["path"]
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    if isinstance(source, dict) and source.get("bytes") is not None:
        return {"bytes": source["bytes"], "path": source.get("path")}
    if isinstance(source, PILImage.Image | np.ndarray):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"has the image {source!r:.60} of type {type(source).__name__}: write its path.")
    source = str(source)
    if source.startswith("data:"):
        try:
            return {"bytes": base64.b64decode(source.partition(",")[2], validate=True), "path": None}
        except binascii.Error as error:
            raise ValueError(f"has an image whose base64 cannot be read ({error}).") from error
    if source.startswith(("http://", "https://")):
        raise ValueError(f"has the image {source}: download it, and write its path.")
    path = folder / source
    if not path.is_file():
        raise FileNotFoundError(f"has no image at {path}.")
    return str(path)
