"""Checks of a checkpoint's small files before they are read: what is damaged is an error that names the file."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")
# One of them holds the words of a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def is_path(source: str) -> bool:
    """Return whether a source is a folder of this machine, or looks like one, and is no name of a repository."""
    return Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds."""
    return parse_object(str(path), read_text(path))


def read_text(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no UTF-8 text ({error}): copy or download it again.") from error


def parse_object(name: str, text: str) -> dict[str, Any]:
    """Return the JSON object in the text of a file, see [`read_object`]."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is damaged, it is no JSON ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, not a {type(content).__name__}.")
    return content


def check_files(source: Any, names: Iterable[str]) -> None:
    """Refuse a folder that does not exist or holds a damaged JSON file; a repository is left to the Hub's client."""
    folder = Path(source).expanduser()
    if is_path(str(source)) and not folder.exists():
        raise FileNotFoundError(f"There is no folder {source}.")
    for name in names:
        if (folder / name).is_file():
            read_object(folder / name)


def check_names(path: Path, known: list[str]) -> None:
    """Refuse a file with a field that is nearly one of `known`; other fields are those of tools."""
    for name in read_object(path) if path.is_file() else ():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near and name not in known:
            raise ValueError(f"{path} has the field {name!r}, which is unknown: did you mean {near[0]!r}?")


def processor_problem(folder: Path) -> str | None:
    """Return what a folder lacks of a processor, where that can be told from its files."""
    if not folder.is_dir():
        return None
    path = folder / "processor_config.json"
    if not path.is_file():
        return "there is no processor_config.json: save the processor to this folder"
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return "there is no tokenizer.json"
    if not (folder / "preprocessor_config.json").is_file():
        image_processor = read_object(path).get("image_processor")
        if not isinstance(image_processor, dict):
            return f"image_processor in processor_config.json must be an object, not {image_processor!r}"
    return None


def check_config(path: Path) -> None:
    """Refuse a config from which the model cannot be told; a reader would fill it with defaults."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is no checkpoint.")
    check_config_fields(str(path), read_object(path))


def check_config_fields(path: str, content: dict[str, Any]) -> None:
    """Refuse the content of such a config, see [`check_config`]."""
    composed = ("text_config",) if content.get("host_type") is None else ()
    for name in ("model_type", *composed, "moe_config"):
        if name not in content:
            raise ValueError(f"{path} lacks {name!r}: it is damaged, or was not written by hf_moe.")
    for name in ("text_config", "vision_config", "moe_config", "auto_map"):
        if not isinstance(content.get(name), dict | None):
            raise ValueError(f"{path}: {name} must be an object, not {content[name]!r}.")
    for name in ("text_config", "vision_config"):
        if content.get(name) is not None and "model_type" not in content[name]:
            raise ValueError(f"{path}: {name} lacks 'model_type'.")
