"""Files of rows: JSON lines, JSON, CSV, Parquet and Arrow, with every value as it is written."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet
from accelerate.utils import recursively_apply


# Errors within a row: each reader's own, and those of types that a row should not have.
ROW_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error, pa.ArrowException)
Record: TypeAlias = tuple[int, dict[str, Any]]


class Scalar(str):
    """A number or boolean of JSON as it is written: `1.50` as an answer keeps its zero."""


def plain(value: Any) -> Any:
    """Return a value whose scalars are numbers and booleans."""
    return recursively_apply(json.loads, value, test_type=lambda item: isinstance(item, Scalar))


def read_records(file: Path) -> Iterator[Record]:
    """Give the rows of a file and their numbers. Those of JSON hold each number and boolean as a [`Scalar`]."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{file} is no file of rows that can be read: {FORMATS}.")
    index = -1
    try:
        for index, row in READERS[file.suffix.lower()](file):
            yield index, row
    except ROW_ERRORS as error:
        raise ValueError(f"Row {index + 1} of {file} cannot be read: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if index < 0:
        raise ValueError(f"{file} holds no rows.")


def _read_json_lines(file: Path) -> Iterator[Record]:
    index = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _decode(raw, number)
            if line.strip():
                yield index, _object(_parse(line), f"line {number}")
                index += 1


def _read_json(file: Path) -> Iterator[Record]:
    text = _decode(file.read_bytes())
    if not text.strip():
        return
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _read_json_lines(file)  # one object a line, under the other name
        return
    if not isinstance(rows, list):
        raise ValueError(f"the file holds {_shown(rows)}, not a list of rows. Rows one a line are a .jsonl file.")
    for index, row in enumerate(rows):
        yield index, _object(row, f"element {index}")


def _read_csv(file: Path) -> Iterator[Record]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    lines = io.StringIO(_decode(file.read_bytes()), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(reader, [])
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(f"the header is {header}: each column needs a name of its own.")
    for index, cells in enumerate(filter(None, reader)):
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells for the {len(header)} columns {', '.join(header)}.")
        yield index, {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}


def _read_parquet(file: Path) -> Iterator[Record]:
    batches = pyarrow.parquet.ParquetFile(file).iter_batches()
    yield from enumerate(row for batch in batches for row in batch.to_pylist())


def _read_arrow(file: Path) -> Iterator[Record]:
    with pa.memory_map(str(file)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        yield from enumerate(row for batch in table.to_batches() for row in batch.to_pylist())


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_json_lines), ".json": _read_json,
    **dict.fromkeys((".csv", ".tsv"), _read_csv), ".parquet": _read_parquet, ".arrow": _read_arrow,
}  # fmt: skip
TABLES = (".parquet", ".arrow")
FORMATS = f"rows are read from {', '.join(READERS)}"


def _decode(raw: bytes, line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise ValueError(f"line {line} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error


def _parse(text: str) -> Any:
    return json.loads(
        text, parse_int=Scalar, parse_float=Scalar, parse_constant=_refuse_constant, object_pairs_hook=_fields
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON: write null, or a text.")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r} occurs twice in an object.")
        fields[name] = recursively_apply(_written, value, test_type=lambda item: isinstance(item, bool))
    return fields


def _written(value: bool) -> Scalar:
    return Scalar(json.dumps(value))


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds {_shown(row)}, and a row is an object with 'messages'.")
    return row


def _shown(value: Any) -> str:
    kind = {dict: "an object", list: "a list", str: "a text", Scalar: "a number", type(None): "null"}
    return f"{kind.get(type(value), type(value).__name__)} ({value!r:.60})"
