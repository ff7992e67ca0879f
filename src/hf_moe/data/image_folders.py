"""Folders of images, with their questions and answers in metadata files or in the names of class folders."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

from .file_rows import as_dataset, read_row
from .files import read_records


logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def rows_of_images(folder: Path, split: str, question: str | None = None) -> Dataset:
    """Return a row for each image of a split, as `datasets`' `imagefolder` finds them.

    What metadata files say is taken as it is written. Where there are any, only the images in them are rows.

    Args:
        question: of the images that have none of their own.

    Raises:
        FileNotFoundError: if the folder, or an image that its metadata name, is not there.
        ValueError: if an image has no question or no answer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = load_dataset("imagefolder", data_dir=str(folder), split=split, drop_metadata=True)
    labels = found.features["label"].names if "label" in found.column_names else None
    found = found.cast_column("image", Image(decode=False))
    described = _metadata(folder)
    root = folder.resolve()
    rows: list[tuple[int, dict[str, Any]]] = []
    left_out = 0
    for image in found:
        path = Path(image["image"]["path"]).resolve()
        if described and path not in described:
            left_out += 1
            continue
        source, index, fields = described.get(path, (folder, len(rows), {}))
        if not described and labels is not None:
            fields = {"answer": labels[image["label"]]}
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        fields = _with_question(fields, question, name)
        rows.append((index, read_row({"image_id": name, **fields, "image": str(path)}, index, str(source), folder)))
    if left_out:
        logger.warning("%d images of %s are in none of its metadata files, and are left out.", left_out, folder)
    if not rows:
        raise ValueError(f"No image of the split {split!r} of {folder} is in its metadata files.")
    return as_dataset(rows, str(folder))


def _metadata(folder: Path) -> dict[Path, tuple[Path, int, dict[str, Any]]]:
    """Return, for each image that a metadata file names, that file, the number of its row, and the row."""
    described: dict[Path, tuple[Path, int, dict[str, Any]]] = {}
    for file in sorted(file for name in METADATA for file in folder.rglob(name)):
        for index, row in read_records(file):
            name = row.pop("file_name", None)
            if not isinstance(name, str):
                raise ValueError(f"Row {index} of {file} has no file_name; it has {', '.join(row)}.")
            path = (file.parent / name).resolve()
            if not path.is_file():
                raise FileNotFoundError(f"Row {index} of {file} has no image at {path}.")
            if path in described:
                other, number, _ = described[path]
                raise ValueError(f"Row {index} of {file} is about {name}, and so is row {number} of {other}.")
            described[path] = (file, index, row)
    return described


def _with_question(fields: dict[str, Any], question: str | None, name: str) -> dict[str, Any]:
    if "messages" in fields or "conversations" in fields:
        return fields
    column = next((name for name in ("answer", "text") if fields.get(name) is not None), None)
    answer = None if column is None else fields[column]
    asked = fields.get("question") or question
    if answer is None or answer == "":
        raise ValueError(
            f"The image {name} has no answer: add a metadata.csv or metadata.jsonl with the columns file_name and "
            f"answer (or text), or put the images in a folder per class. It has {', '.join(fields) or 'no columns'}."
        )
    if not asked:
        raise ValueError(f"The images have no questions ({name}): add a column, or set the source's question.")
    others = {name: value for name, value in fields.items() if name != column}
    return {**others, "question": asked, "answer": answer}
