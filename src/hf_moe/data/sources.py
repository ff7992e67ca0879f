"""Where rows come from: the data sets of this package, files, folders, the Hub."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk

from .easy_vqa import load_easy_vqa
from .file_rows import rows_of_file, rows_of_list
from .media_folders import ENDINGS, rows_of_folder
from .opposite_tasks import load_opposite_tasks
from .records import FORMATS, READERS
from .speech_and_sight import load_speech_and_sight


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "easy_vqa": load_easy_vqa,
    "opposite_tasks": load_opposite_tasks,
    "speech_and_sight": load_speech_and_sight,
}
# The kinds of sources, the one that decides first, with their own options.
MEDIA_FOLDERS = {"image_folder": "image", "video_folder": "video", "audio_folder": "audio"}
SOURCES = {**dict.fromkeys(MEDIA_FOLDERS, ("question",)), "hub": ("name", "streaming"), "path": (), "name": ()}
COMMON_OPTIONS = {"where", "limit", "shuffle", "seed", "ignore"}
TYPES: dict[str, Any] = {
    **dict.fromkeys(("path", "hub", *MEDIA_FOLDERS), str | Path), "name": str, "question": str, "streaming": bool,
    "where": dict, "limit": int, "shuffle": bool, "seed": int, "ignore": list | tuple,
}  # fmt: skip
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SOURCE_FORMS = (
    f"a file ({FORMATS}), a folder of images, videos, sounds or of such files, a dataset of the Hub ('user/name'), or "
    f"one of {', '.join(DATASETS)}"
)


def load_rows(source: dict[str, Any] | str | Path | list[dict], split: str = "train") -> Dataset | IterableDataset:
    """Load rows of `messages` (lists of role and content parts) and, if there are any, `images` (decoded when read),
    `videos` and `audios` (as paths or bytes).

    A source is one of:

    - `{"name": "easy_vqa"}`: a dataset this package knows; the others are `opposite_tasks` and `speech_and_sight`.
    - `{"path": "rows.jsonl"}`: a file of rows (JSON lines, JSON, CSV, Parquet, Arrow), image paths relative to the
      file; or a folder of such files, named after their splits. `{split}` in the path is filled in.
    - `{"image_folder": "folder", "question": "What is this?"}`: as `datasets`' `imagefolder` finds them. The question
      of a row is its `question`, else the source's; the answer is its `answer`, its `text`, or its class folder's
      name. `video_folder` and `audio_folder` likewise, with the files of a split in the folder named after it.
    - `{"hub": "user/name", "name": "config", "streaming": true}`: rows that hold conversations already.

    A row holds `messages`, `conversations`, or a `question` and an `answer`; answers are the text as it is written.
    Messages with fields beyond role and content, and `tools`, come as JSON text.

    Each takes `where` (column to value: only rows that have it), `ignore` (columns to drop), `limit` (at most so many
    rows), `shuffle` (bool) and `seed`; limiting comes after shuffling. A string is a dataset's name, a file, a folder,
    or a Hub id; a list is the rows themselves.

    Raises:
        ValueError: if source or option are unknown, a row is not of this form, or none is left.
        FileNotFoundError: if a file or an image is not there.
    """
    if isinstance(source, list | tuple):
        return rows_of_list(source)
    source = _as_dict(source)
    kind = check_source(source)
    rows: Dataset | IterableDataset
    if kind == "name":
        if source["name"] not in DATASETS:
            raise ValueError(f"No dataset is named {source['name']!r}; known: {', '.join(DATASETS)}.")
        rows = DATASETS[source["name"]](split)
    elif kind == "hub":
        rows = _load_hub(split, str(source["hub"]), source.get("name"), bool(source.get("streaming")))
    elif kind == "path":
        file = Path(str(source["path"]).replace("{split}", split)).expanduser()
        rows = _load_folder(file, split) if file.is_dir() else rows_of_file(file)
    else:
        rows = rows_of_folder(Path(source[kind]).expanduser(), split, source.get("question"), MEDIA_FOLDERS[kind])
    if source.get("where"):
        rows = _where(rows, source["where"])
    if source.get("ignore"):
        _check_columns(rows, source["ignore"], "ignore")
        rows = rows.remove_columns(list(source["ignore"]))
    if source.get("shuffle"):
        rows = rows.shuffle(seed=source.get("seed", 0))
    if source.get("limit") is not None:
        limit = source["limit"]
        rows = rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))
    return rows


def _check_columns(rows: Dataset | IterableDataset, names: Any, option: str) -> None:
    for name in names:
        if rows.column_names is not None and name not in rows.column_names:
            raise ValueError(f"{option}: there is no column {name!r}; the rows have {', '.join(rows.column_names)}.")


def _where(rows: Dataset | IterableDataset, wanted: dict[str, Any]) -> Dataset | IterableDataset:
    _check_columns(rows, wanted, "where")
    columns = list(wanted)
    rows = rows.filter(lambda *values: list(values) == list(wanted.values()), input_columns=columns)
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError(f"No row has {wanted!r}.")
    return rows


def _as_dict(source: Any) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"A source of rows is a text or an object of options, got {source!r:.100}.")
    if source in DATASETS:
        return {"name": source}
    path = Path(source).expanduser()
    if path.is_dir():
        found = {file.suffix.lower() for file in path.rglob("*")}
        has_rows = any(file.suffix.lower() in READERS and file.stem != "metadata" for file in path.iterdir())
        kinds = {"image_folder": "image"} if has_rows else MEDIA_FOLDERS  # rows name their videos and sounds
        return {next((option for option, kind in kinds.items() if ENDINGS[kind] & found), "path"): str(path)}
    if path.suffix.lower() in READERS or path.is_file():
        return {"path": str(path)}
    return {"hub": str(source)}


def check_source(source: dict[str, Any]) -> str:
    """Return the kind of a source of rows, the first of `SOURCES` that it has; refuse unknown and mistyped options."""
    kind = next((kind for kind in SOURCES if kind in source), None)
    if kind is None:
        raise ValueError(f"A source of rows has one of the keys {', '.join(SOURCES)}; got {source!r}.")
    names = sorted({kind, *SOURCES[kind], *COMMON_OPTIONS})
    unknown = next((name for name in source if name not in names), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"The source {kind!r} has no option {unknown!r}; it takes {', '.join(names)}.{hint}")
    for name, value in source.items():
        if value is None and name not in ("path", *MEDIA_FOLDERS, "hub"):
            continue
        if not isinstance(value, TYPES[name]) or (isinstance(value, bool) and TYPES[name] is int):
            wanted = getattr(TYPES[name], "__name__", str(TYPES[name]))
            raise ValueError(f"{name}={value!r:.100} of a source is of type {type(value).__name__}, not {wanted}.")
    if source.get("limit") is not None and source["limit"] < 1:
        raise ValueError(f"limit={source['limit']} of a source of rows leaves none: it is at least 1.")
    return kind


def _load_folder(folder: Path, split: str) -> Dataset:
    """Load a split of a folder: what `save_to_disk` has left, or the file that is named after the split."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        rows = load_from_disk(str(folder))
        if isinstance(rows, DatasetDict) and split not in rows:
            raise ValueError(f"{folder} has the splits {', '.join(rows)}, got {split!r}.")
        return rows[split] if isinstance(rows, DatasetDict) else rows
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    named = [file for file in files if file.stem == split]
    if len(named) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{folder} has not one file of rows named {split!r}; it has {names}. {FORMATS}.")
    return rows_of_file(named[0])


def _load_hub(split: str, hub: str, name: str | None, streaming: bool) -> Dataset | IterableDataset:
    form = f"a source is {SOURCE_FORMS}"
    if not Path(hub).is_dir() and (Path(hub).suffix.lower() in READERS or not HUB_ID.fullmatch(hub)):
        raise FileNotFoundError(f"There is no folder {hub}, and a dataset of the Hub is not called so: {form}.")

    def load(**options: Any) -> Dataset | IterableDataset:
        try:
            return load_dataset(hub, name, split=split, streaming=streaming, **options)
        except (OSError, ConnectionError) as error:
            message = f"There is no file or folder {hub}, nor such a dataset in reach: {error}. {form}"
            raise FileNotFoundError(message) from error

    rows = load()
    columns = rows.column_names
    if columns is None:
        rows = rows._resolve_features()
        columns = rows.column_names
    if rows.info.builder_name == "csv":  # else 007 is read as 7
        rows = load(features=Features({column: Value("string") for column in columns}), keep_default_na=False)
    if not ({"messages", "conversations"} & set(columns) or {"question", "answer"} <= set(columns)):
        raise ValueError(
            f"{hub} has the columns {', '.join(columns)} and no messages: map its rows to messages (and images) "
            "first, or to conversations, or to question and answer."
        )
    return rows
