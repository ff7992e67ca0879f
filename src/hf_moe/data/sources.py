"""Where rows come from: easy-VQA, two opposite tasks, a JSONL file, a folder of images, the Hub."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset, List, load_dataset

from .easy_vqa import load_easy_vqa
from .opposite_tasks import load_opposite_tasks
from .rows import MESSAGES, normalise_messages, question_messages, row_images


DATASETS = {"easy_vqa": load_easy_vqa, "opposite_tasks": load_opposite_tasks}
COMMON_OPTIONS = {"where", "limit", "shuffle", "seed"}


def load_rows(source: dict[str, Any] | str, split: str = "train") -> Dataset | IterableDataset:
    """Load rows of `messages` (lists of role and content parts) and, if there are any, `images` (decoded when read).

    A source is one of:

    - `{"name": "easy_vqa"}`: a dataset this package knows, or `opposite_tasks`.
    - `{"path": "rows.jsonl"}`: one row a line, image paths relative to the file. `{split}` in the path is filled in.
    - `{"image_folder": "folder", "question": "What is this?"}`: as `datasets`' `imagefolder` reads it. The question of
      a row is its `question`, else the source's; the answer is its `answer`, its `text`, or its class folder's name.
    - `{"hub": "user/name", "name": "config", "streaming": true}`: rows that have `messages` already.

    Each takes `where` (column to value: only rows that have it), `limit` (at most so many rows), `shuffle` (bool) and
    `seed`; limiting comes after shuffling. A string is a dataset's name, a path ending in `.jsonl`, a folder, or a Hub
    id.

    Raises:
        ValueError: if the source is unknown, has an unknown option, or rows are not of this form (naming the row), or
            none is left.
        FileNotFoundError: if a file or an image is not there.
    """
    source = _as_dict(source)
    loaders: dict[str, Callable] = {
        "image_folder": _load_image_folder,
        "hub": _load_hub,
        "path": _load_jsonl,
        "name": _load_named,
    }
    kind = next((kind for kind in loaders if kind in source), None)
    if kind is None:
        raise ValueError(f"A source of rows has one of the keys {', '.join(loaders)}; got {source!r}.")
    options = {name: value for name, value in source.items() if name not in COMMON_OPTIONS}
    rows = loaders[kind](split, **_checked(kind, options))
    if source.get("where"):
        rows = _where(rows, source["where"])
    if source.get("shuffle"):
        rows = rows.shuffle(seed=source.get("seed", 0))
    if source.get("limit") is not None:
        limit = source["limit"]
        rows = rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))
    return rows


def _where(rows: Dataset | IterableDataset, wanted: dict[str, Any]) -> Dataset | IterableDataset:
    for name in wanted:
        if rows.column_names is not None and name not in rows.column_names:
            raise ValueError(f"where: there is no column {name!r}; the rows have {', '.join(rows.column_names)}.")
    columns = list(wanted)
    rows = rows.filter(lambda *values: list(values) == list(wanted.values()), input_columns=columns)
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"No row has {wanted!r}.")
    return rows


def _as_dict(source: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    if source in DATASETS:
        return {"name": source}
    if source.endswith(".jsonl"):
        return {"path": source}
    return {"image_folder": source} if Path(source).is_dir() else {"hub": source}


def _checked(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    allowed = {"image_folder": {"question"}, "hub": {"name", "streaming"}}.get(kind, set()) | {kind}
    unknown = next((name for name in options if name not in allowed), None)
    if unknown is not None:
        names = sorted(allowed | COMMON_OPTIONS)
        close = difflib.get_close_matches(unknown, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"The source {kind!r} has no option {unknown!r}; it takes {', '.join(names)}.{hint}")
    return options


def _load_named(split: str, name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"No dataset is named {name!r}; known: {', '.join(DATASETS)}. Datasets of the Hub are 'hub'.")
    return DATASETS[name](split)


def _load_jsonl(split: str, path: str) -> Dataset:
    file = Path(path.replace("{split}", split))
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    rows = []
    with file.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            if line.strip():
                try:
                    rows.append(_jsonl_row(json.loads(line), file.parent))
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"Row {index} of {file}: {error}") from error
                except ValueError as error:
                    raise ValueError(f"Row {index} of {file}: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no rows.")
    rows_dataset = Dataset.from_list(rows)
    return rows_dataset.cast_column("messages", MESSAGES).cast_column("images", List(Image()))


def _jsonl_row(row: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError(f"expected an object with a list 'messages', got {str(row)[:100]}.")
    paths = row_images(row)
    images = [str(folder / path) for path in paths]
    missing = next((path for path in images if not Path(path).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"there is no image {missing}.")
    messages = normalise_messages(row["messages"], len(images))
    filled = [{**message, "content": [{"text": None, **part} for part in message["content"]]} for message in messages]
    extra = {name: value for name, value in row.items() if name not in ("messages", "images", "image")}
    return {"image_id": [str(path) for path in paths], **extra, "messages": filled, "images": images}


def _load_image_folder(split: str, image_folder: str, question: str | None = None) -> Dataset:
    folder = Path(image_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    rows = load_dataset("imagefolder", data_dir=str(folder), split=split)
    answer = next((name for name in ("answer", "text", "label") if name in rows.column_names), None)
    if answer is None:
        raise ValueError(
            f"The images of {folder} have no answers: add a metadata.csv or metadata.jsonl with the columns file_name "
            f"and answer (or text), or put the images in a folder per class. Found: {', '.join(rows.column_names)}."
        )
    if question is None and "question" not in rows.column_names:
        raise ValueError(f"The images of {folder} have no questions: add a column, or set the source's question.")
    label = rows.features[answer]
    names = label.names if isinstance(label, ClassLabel) else None
    rows = rows.cast_column("image", Image(decode=False))

    def to_row(row: dict[str, Any]) -> dict[str, Any]:
        asked = row.get("question") or question
        text = names[row[answer]] if names is not None else row[answer]
        if not asked or not text:
            raise ValueError(f"The image {row['image']['path']} has no question or no answer.")
        path = Path(row["image"]["path"])
        name = path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else path
        return {
            "messages": question_messages(asked, text),
            "images": [row["image"]],
            "image_id": str(name),
            "answer": text,
        }

    rows = rows.map(to_row, remove_columns=["image"])
    return rows.cast_column("messages", MESSAGES).cast_column("images", List(Image()))


def _load_hub(split: str, hub: str, name: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    rows = load_dataset(hub, name, split=split, streaming=streaming)
    columns = rows.column_names
    if columns is None:
        rows = rows._resolve_features()
        columns = rows.column_names
    if "messages" not in columns:
        raise ValueError(
            f"{hub} has the columns {', '.join(columns)} and no messages: map its rows to messages (and images) first."
        )
    return rows
