"""Rows of files as datasets: conversations in one form, paths relative to the file, all columns of all rows."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value

from .messages import from_json, text_of, without_fill
from .records import ROW_ERRORS, TABLES, plain, read_records
from .rows import MEDIA_COLUMNS, MESSAGES, OPTION_COLUMNS, row_media, row_messages, template_options
from .stored import MEDIA_FEATURES, STORE


TEXT_COLUMNS = ("question", "answer", "question_type", "id")
READ_COLUMNS = ("messages", "conversations", *MEDIA_COLUMNS)
TYPE_ERRORS = (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError)  # of values that make no column


def rows_of_file(file: Path) -> Dataset:
    """Return the rows of a file of JSON lines, JSON, CSV, Parquet or Arrow; see [`read_row`]."""
    filled = file.suffix.lower() in TABLES
    rows = ((index, read_row(row, index, str(file), file.parent, filled)) for index, row in read_records(file))
    return as_dataset(rows, str(file))


def rows_of_list(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return rows in memory as [`rows_of_file`] returns those of a file; paths are relative to the working folder."""
    if not rows:
        raise ValueError("The list holds no rows.")
    read = ((index, read_row(row, index, "the list", Path(), filled=True)) for index, row in enumerate(rows))
    return as_dataset(read, "the list")


def as_dataset(rows: Iterable[tuple[int, dict[str, Any]]], place: str) -> Dataset:
    """Return rows and their numbers as a dataset that has all of their columns, each of one type.

    A row has `None` in the columns that it lacks; `place` is where the rows come from.
    """
    numbers, records = zip(*rows, strict=True)
    names = list(dict.fromkeys(name for row in records for name in row))
    if len({type(row.get("image_id")) for row in records}) > 1:  # some rows name their images themselves
        for row in records:
            row["image_id"] = row["image_id"] if isinstance(row["image_id"], list) else [row["image_id"]]
    columns = {name: [row.get(name) for row in records] for name in names}
    features: dict[str, Any] = {name: feature for name, feature in MEDIA_FEATURES.items() if name in names}
    if any(has_fields(messages) for messages in columns["messages"]):
        # Fields that only some messages have are of many types, which one Arrow column does not hold.
        columns["messages"] = [json.dumps(messages) for messages in columns["messages"]]
    else:
        features["messages"] = MESSAGES
        columns["messages"] = [[_filled(message) for message in messages] for messages in columns["messages"]]
    for name in names:
        if name in OPTION_COLUMNS:
            columns[name] = [json.dumps(v) if v is not None and not isinstance(v, str) else v for v in columns[name]]
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
    except TYPE_ERRORS:
        first = next(value for value in values if value is not None)
        for number, value in zip(numbers, values, strict=True):
            try:
                pa.array([first, value])
            except TYPE_ERRORS as error:
                raise ValueError(
                    f"Row {number} of {place} has {name}={value!r:.60}, and a row before it {name}={first!r:.60}: "
                    "a column is of one type in all rows."
                ) from error
        raise ValueError(f"The column {name!r} of {place} is not of one type in all rows.") from None


def read_row(row: Any, index: int, place: str, folder: Path, filled: bool = False) -> dict[str, Any]:
    """Return a row with its messages, images, videos and sounds in one form; paths start from `folder`."""
    try:
        return _row(row, folder, filled)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Row {index} of {place} {error}") from error
    except ROW_ERRORS as error:
        raise ValueError(f"Row {index} of {place} {error}") from error


def _row(row: Any, folder: Path, filled: bool) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"is {row!r:.100}: a row is an object with 'messages'.")
    row = {name: value for name, value in row.items() if value is not None}
    for name in MEDIA_COLUMNS:
        if isinstance(row.get(name), str) and row[name].startswith("["):  # a list in a cell
            row[name] = from_json(row[name], name)
    messages, sources = plain(row_messages(row, filled)), row_media(row, "image")
    template_options(plain(row), filled)  # so that a fault is found here
    others = {name: plain(value) for name, value in row.items() if name not in READ_COLUMNS}
    if filled:
        others |= {name: without_fill(others[name], f"the {name}") for name in OPTION_COLUMNS if name in others}
    texts: dict[str, Any] = {name: text_of(row[name], name) for name in TEXT_COLUMNS if name in row}
    for name in ("answers", "image_id"):
        if name in row:
            values = from_json(row[name], name) if str(row[name]).startswith("[") else row[name]
            several = isinstance(values, list)
            texts[name] = [text_of(value, name) for value in values] if several else text_of(values, name)
    if isinstance(texts.get("answers"), str):
        texts["answers"] = [texts["answers"]]
    images = [STORE["image"](source, folder) for source in sources]
    names = [_name(source, image) for source, image in zip(sources, images, strict=True)]
    read = {"image_id": names, **others, **texts, "messages": messages, "images": images}
    for kind in ("video", "audio"):
        if held := row_media(row, kind):
            read[f"{kind}s"] = [STORE[kind](plain(source), folder) for source in held]
    return read


def _name(source: Any, image: Any) -> str:
    """Return the name of an image: as the row writes it, or made of its bytes."""
    if isinstance(source, str) and (isinstance(image, str) or "://" in source[:8]):
        return str(source)
    content = source if isinstance(source, bytes) else pickle.dumps(source)
    return hashlib.sha256(content).hexdigest()
