"""Folders of images, videos or sounds, with questions and answers in metadata files or the names of class folders."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

from .file_rows import as_dataset, read_row
from .records import read_records


logger = logging.getLogger(__name__)

ENDINGS = {
    "image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"},
    "video": {".mp4", ".mkv", ".avi", ".mpeg", ".mov", ".webm", ".gif"},
    "audio": {".wav", ".flac", ".mp3", ".ogg", ".opus"},
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def rows_of_folder(folder: Path, split: str, question: str | None = None, kind: str = "image") -> Dataset:
    """Return a row for each image of a split, as `datasets`' `imagefolder` finds them, or for each video or sound.

    Videos and sounds of a split are in the folder named after it, or all in one without such folders, then of `train`.
    What metadata files say is taken as it is written. Where there are any, only the files in them are rows. The
    question is that of the files that have none of their own.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = _images(folder, split) if kind == "image" else _files(folder, split, kind)
    described = _metadata(folder, kind)
    root = folder.resolve()
    rows: list[tuple[int, dict[str, Any]]] = []
    left_out = 0
    for path, label in found:
        if described and path not in described:
            left_out += 1
            continue
        source, index, fields = described.get(path, (folder, len(rows), {}))
        if not described and label is not None:
            fields = {"answer": label}
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        fields = _with_question(fields, question, name)
        named = {"image_id" if kind == "image" else "id": name}
        rows.append((index, read_row({**named, **fields, kind: str(path)}, index, str(source), folder)))
    if left_out:
        logger.warning("%d %ss of %s are in none of its metadata files, and are left out.", left_out, kind, folder)
    if not rows:
        raise ValueError(f"No {kind} of the split {split!r} of {folder} is in its metadata files.")
    return as_dataset(rows, str(folder))


def _images(folder: Path, split: str) -> list[tuple[Path, str | None]]:
    """Return the images of a split, each with the name of its class."""
    found = load_dataset("imagefolder", data_dir=str(folder), split=split, drop_metadata=True)
    labels = found.features["label"].names if "label" in found.column_names else None
    found = found.cast_column("image", Image(decode=False))
    return [
        (Path(item["image"]["path"]).resolve(), None if labels is None else labels[item["label"]]) for item in found
    ]


def _files(folder: Path, split: str, kind: str) -> list[tuple[Path, str | None]]:
    """Return the videos or sounds of a split, each with the name of its class."""
    splits = [name for name in ("train", "validation", "test", split) if (folder / name).is_dir()]
    if split not in (splits or ["train"]):
        raise ValueError(f"{folder} has the splits {', '.join(splits) or 'train'}, got {split!r}.")
    root = folder / split if splits else folder
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS[kind])
    if not files:
        raise ValueError(f"{root} holds no {kind} files; they end in {', '.join(sorted(ENDINGS[kind]))}.")
    return [(file.resolve(), None if file.parent == root else file.parent.name) for file in files]


def _metadata(folder: Path, kind: str) -> dict[Path, tuple[Path, int, dict[str, Any]]]:
    """Return, for each file that a metadata file names, that file, the number of its row, and the row."""
    described: dict[Path, tuple[Path, int, dict[str, Any]]] = {}
    for file in sorted(file for name in METADATA for file in folder.rglob(name)):
        for index, row in read_records(file):
            name = row.pop("file_name", None)
            if not isinstance(name, str):
                raise ValueError(f"Row {index} of {file} has no file_name; it has {', '.join(row)}.")
            path = (file.parent / name).resolve()
            if not path.is_file():
                raise FileNotFoundError(f"Row {index} of {file} has no {kind} at {path}.")
            if path in described:
                other, number, _ = described[path]
                raise ValueError(f"Row {index} of {file} is about {name}, and so is row {number} of {other}.")
            described[path] = (file, index, row)
    return described


def _with_question(fields: dict[str, Any], question: str | None, name: str) -> dict[str, Any]:
    if "messages" in fields or "conversations" in fields:
        return fields
    column = "text" if fields.get("answer") is None else "answer"
    answer, asked = fields.get(column), fields.get("question") or question
    if answer is None or answer == "":
        raise ValueError(
            f"The file {name} has no answer: add a metadata.csv or metadata.jsonl with the columns file_name and "
            f"answer (or text), or put the files in a folder per class. It has {', '.join(fields) or 'no columns'}."
        )
    if not asked:
        raise ValueError(f"The files have no questions ({name}): add a column, or set the source's question.")
    others = {name: value for name, value in fields.items() if name != column}
    return {**others, "question": asked, "answer": answer}
