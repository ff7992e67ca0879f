"""The bundle: the code that a checkpoint runs, written beside its weights.

In the package the code lies in folders; in a checkpoint it lies flat: the model's files, one file per mechanism that
the config names, and a generated `mechanisms.py` that lists them. Transformers copies these files by itself whenever a
model that was loaded from them is saved again.
"""

import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports

from ..configuration.configuration_hf_moe import AUTO_MAP, PLACE_FIELDS
from ..configuration.layer_maps import at_layer, layer_values
from ..configuration.moe_config import MECHANISM_FIELDS, objective_entry
from ..configuration.reading import read_object
from ..modeling.mechanisms import get_mechanism, mechanism_names
from ..modeling.registry import KINDS
from ..version import __version__
from .flatten import PACKAGE_FOLDER, TRAVELLING_FOLDERS, flat_name, flatten, top_level_effects


MARK = "# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file."
DIGEST = "# SHA-256 of the model's code: "

CONFIGURATION = PACKAGE_FOLDER / "configuration" / "configuration_hf_moe.py"
MODELING = PACKAGE_FOLDER / "modeling" / "modeling_hf_moe.py"
PROCESSING = PACKAGE_FOLDER / "modeling" / "processing_hf_moe.py"
MECHANISM_LIST = PACKAGE_FOLDER / "modeling" / "mechanisms.py"

# Only the bundled copies are registered: with it, Transformers' own copying does every later save, which it could not
# do for a package in folders.
REGISTRATION = {
    CONFIGURATION: "HfMoeConfig.register_for_auto_class()",
    MODELING: 'HfMoeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")',
    PROCESSING: "HfMoeProcessor.register_for_auto_class()",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_hf_moe.HfMoeProcessor"}

GENERATED_MECHANISMS = '''\
"""The mechanisms that this checkpoint carries."""

import functools

from .configuration_hf_moe import unknown_name_message


@functools.cache
def _mechanisms() -> dict[str, dict[str, type]]:
    # Imported when the first one is asked for: a mechanism that builds others imports this file.
{imports}

    return {{
{entries}
    }}


def mechanism_names(kind: str) -> list[str]:
    """Return the names of the mechanisms of `kind` that this checkpoint carries.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in _mechanisms():
        raise ValueError(unknown_name_message("kind of mechanism", kind, list(_mechanisms())))
    return sorted(_mechanisms()[kind])


def get_mechanism(kind: str, name: str) -> type:
    """Return the class of a mechanism.

    Raises:
        ValueError: if this checkpoint does not carry it.
    """
    if name not in mechanism_names(kind):
        raise ValueError(
            f"This checkpoint does not carry the {{kind}} {{name!r}} that its config.json asks for, only: "
            f"{{', '.join(mechanism_names(kind)) or 'none'}}. Restore config.json, or build and save the model with "
            "the package: pip install hf-moe"
        )
    return _mechanisms()[kind][name]
'''


def prepare_bundle(obj: Any, folder: str) -> Callable[[], None]:
    """Collect the code that a config or a processor needs, before anything is saved.

    Args:
        obj (`Any`): an `HfMoeConfig`, which brings the model's code, or an `HfMoeProcessor`.
        folder (`str`): the checkpoint's folder.

    Returns a function that writes the code, to be called once `obj` has been written.

    Raises:
        ValueError: if a mechanism cannot travel: it is defined in a notebook or script, imports what a checkpoint does
            not carry, or its file has the name of another one. Nothing has been written then.
    """
    target = Path(folder)
    is_config = isinstance(obj, PreTrainedConfig)
    _warn_of_subclasses(obj)
    if is_config:
        mark_config(obj)
        entry_files = [CONFIGURATION, MODELING]
        if has_own_processor(obj) and (target / PROCESSING.name).is_file():
            entry_files.append(PROCESSING)
        files = seal(bundle_files(entry_files, used_mechanisms(obj)))
        stale = {path.name for path in target.glob("*.py") if is_marked(path)} - set(files)
    else:
        files = bundle_files([PROCESSING], {})
        stale = set()
    for name in files:
        if (target / name).exists() and not is_marked(target / name):
            raise ValueError(
                f"{target / name} is in the way of the checkpoint's code and was not written by hf_moe: save to "
                "another folder, or rename that file."
            )

    def write() -> None:
        for name, text in files.items():
            replace_text(target / name, text)
        for name in stale:
            (target / name).unlink()
        if not is_config:
            add_processor_auto_map(target)

    return write


def mark_config(config: Any) -> None:
    """Name the classes that open a checkpoint, and the version that writes its code."""
    config.auto_map = {**(getattr(config, "auto_map", None) or {}), **AUTO_MAP}
    config.hf_moe_version = __version__


def has_own_processor(config: Any) -> bool:
    """Return whether the processor of a model travels with it: the one of a host of Transformers does not."""
    return config.host_type is None


def _warn_of_subclasses(obj: Any) -> None:
    """Say that the checkpoint opens as the library's classes: only mechanisms travel from a user's own files."""
    # Saving a model writes the name of its class into the config.
    names = [type(obj).__name__, *(getattr(obj, "architectures", None) or [])]
    foreign = [name for name in names if not name.startswith("HfMoe")]
    if foreign:
        warnings.warn(
            f"The code of {', '.join(foreign)} does not travel: elsewhere the checkpoint opens as the class of hf_moe "
            "that it derives from. Put what is new into a registered router, experts, objective or connector; those "
            "travel from a file of their own.",
            stacklevel=2,
        )


def used_names(config: Any) -> dict[str, list[str]]:
    """Return the names of the mechanisms that a model of this config builds, by kind."""
    names: dict[str, set[str]] = {kind: set() for kind in KINDS}
    built: list[Any] = [config.moe_config.objectives or {}]
    for kind in MECHANISM_FIELDS:
        values = [at_layer(getattr(config.moe_config, kind), layer) for layer in config.moe_layers()]
        # Not every config tells how many layers a tower has; and attention may change, with a router of its own, in a
        # layer without experts.
        places = [moe for name in PLACE_FIELDS.values() if (moe := getattr(config, name)) is not None]
        inside = kind in ("attention", "layer") or (kind == "router" and config.moe_config.attention is not None)
        places += [config.moe_config] if inside else []
        values += [value for moe in places for value in layer_values(getattr(moe, kind))]
        built += [value for value in values if value is not None]
        names[kind] |= {value["name"] for value in values if value is not None}
    names["objective"] = {objective_entry(*entry)[0] for entry in (config.moe_config.objectives or {}).items()}
    if config.host_type is None:
        names["host"].add("composed")
        if config.vision_config is not None:
            built.append(config.connector)
            names["connector"].add(config.connector["name"])
    # A mechanism may build others, of any kind, from entries in its own options.
    for name in (name for options in built for value in options.values() for name in _nested_names(value)):
        for kind in KINDS:
            names[kind] |= {name} & set(mechanism_names(kind))
    return {kind: sorted(used) for kind, used in names.items()}


def _nested_names(value: Any) -> Iterator[str]:
    """Yield the `name` of every mapping in an option of a mechanism."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str):
            yield value["name"]
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _nested_names(item)


def used_mechanisms(config: Any) -> dict[str, dict[str, type]]:
    """Return the classes of the mechanisms that a model of this config builds, by kind and name."""
    return {kind: {name: get_mechanism(kind, name) for name in names} for kind, names in used_names(config).items()}


@dataclass(frozen=True)
class Carried:
    """Mechanisms of a user that are known from a checkpoint alone."""

    # Kind to name to module and class.
    classes: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    # The files that define them and what these import of their own, name to text.
    files: dict[str, str] = field(default_factory=dict)


def bundle_files(
    entry_files: list[Path], mechanisms: dict[str, dict[str, type]], carried: Carried | None = None
) -> dict[str, str]:
    """Return the files of a bundle, name to text: everything that the entry files and the mechanisms import."""
    carried = carried or Carried()
    sources = {cls: _source_file(kind, name, cls) for kind in mechanisms for name, cls in mechanisms[kind].items()}
    classes = {
        kind: {name: (flat_name(sources[cls]), cls.__name__) for name, cls in named.items()}
        | carried.classes.get(kind, {})
        for kind, named in mechanisms.items()
    }
    imported_by_carried = [module for text in carried.files.values() for module in relative_imports(text)]
    library = library_files()
    pending = [*entry_files, *sources.values(), *(library[name] for name in imported_by_carried if name in library)]
    found: dict[Path, str] = {}
    while pending:
        path = pending.pop()
        if path in found:
            continue
        if path == MECHANISM_LIST:
            found[path] = _generated_mechanisms(classes)
            continue
        text, imported = flatten(path)
        if path in REGISTRATION:
            text += f"\n\n{REGISTRATION[path]}\n"
        if PACKAGE_FOLDER not in path.parents and (lines := top_level_effects(path)):
            warnings.warn(
                f"{path} travels whole with the checkpoint, and its lines {lines} run wherever the model is loaded: "
                "move them under `if __name__ == '__main__':` or to another file.",
                stacklevel=2,
            )
        found[path] = text
        pending += imported
    files: dict[str, str] = {}
    origin: dict[str, Path] = {}
    for path, text in found.items():
        name = f"{flat_name(path)}.py"
        if name in files:
            raise ValueError(f"{origin[name]} and {path} would both be {name} in the checkpoint: rename one of them.")
        origin[name] = path
        files[name] = f"{MARK}\n{text}"
    files |= carried.files
    _check_scan(files, origin)
    return files


def _source_file(kind: str, name: str, cls: type) -> Path:
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if cls.__module__ == "__main__" or file is None or getattr(module, cls.__name__, None) is not cls:
        raise ValueError(
            f"The {kind} {name!r} ({cls.__module__}.{cls.__qualname__}) cannot travel with the checkpoint: it is "
            f"defined in a notebook, in the script that runs or inside a function. Put {cls.__name__} at the top "
            f"level of a file of its own, for example my_{kind}.py, and import it from there."
        )
    return Path(file).resolve()


def relative_imports(text: str) -> list[str]:
    """Return the modules that a file of a bundle imports from beside it."""
    return re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)


@functools.cache
def library_files() -> dict[str, Path]:
    """Return the files of the package that can travel, by their names in a checkpoint."""
    paths = (path for folder in TRAVELLING_FOLDERS for path in folder.rglob("*.py") if path.stem != "__init__")
    return {flat_name(path): path for path in paths}


def _generated_mechanisms(classes: dict[str, dict[str, tuple[str, str]]]) -> str:
    imports = {f"    from .{module} import {cls}" for named in classes.values() for module, cls in named.values()}
    entries = [
        f'        "{kind}": {{' + ", ".join(f'"{name}": {cls}' for name, (_, cls) in sorted(named.items())) + "},"
        for kind, named in classes.items()
    ]
    return GENERATED_MECHANISMS.format(imports="\n".join(sorted(imports)), entries="\n".join(entries))


def seal(files: dict[str, str]) -> dict[str, str]:
    """Write the digest of a model's code into each of its files.

    In a process that opens two checkpoints Transformers takes a file of equal content, in folders of one last name,
    for the same module, and the first model that was opened with a class of config for that of all others. With the
    digest no file of two models with different code is equal. The processor's files carry none: they are saved
    without a model too, and nothing is found by their classes.
    """
    own = {name: unsealed(text) for name, text in files.items() if name not in processor_files()}
    digest = hashlib.sha256()
    for name in sorted(own):
        digest.update(f"{name}\0{len(own[name].encode())}\0{own[name]}".encode())
    line = f"{MARK}\n{DIGEST}{digest.hexdigest()}\n"
    return files | {name: line + text.removeprefix(f"{MARK}\n") for name, text in own.items()}


def unsealed(text: str) -> str:
    """Return a file of a bundle without the digest."""
    return re.sub(rf"\A{re.escape(MARK)}\n{re.escape(DIGEST)}[0-9a-f]*\n", f"{MARK}\n", text)


@functools.cache
def processor_files() -> frozenset[str]:
    """Return the names of the files that a processor travels with."""
    return frozenset(bundle_files([PROCESSING], {}))


def _check_scan(files: dict[str, str], origin: dict[str, Path]) -> None:
    """Refuse a file in whose text Transformers' own search would find an import that is none."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in files.items():
            copy = Path(scratch) / name
            copy.write_text(text, encoding="utf-8")
            for module in get_relative_imports(copy):
                if f"{module}.py" not in files:
                    raise ValueError(
                        f"{origin.get(name, name)} has a line that begins with `from .{module} import` and is not an "
                        "import, in a docstring perhaps; Transformers would look for that file: reword the line."
                    )


def is_marked(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == MARK


def replace_text(path: Path, text: str) -> None:
    """Write a file such that a reader, or a crash, sees the old text or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def add_processor_auto_map(folder: Path) -> None:
    """Name the processor's class in the files by which `AutoProcessor` and `AutoTokenizer` look for it."""
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content = read_object(path)
            auto_map = content.get("auto_map", {}) | PROCESSOR_AUTO_MAP
            if auto_map != content.get("auto_map"):
                content["auto_map"] = auto_map
                replace_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
