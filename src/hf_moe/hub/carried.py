"""What code a checkpoint carries, and the code that the installed package would give it."""

import ast
import importlib.util
from typing import Any, NamedTuple

from ..modeling.mechanisms import get_mechanism, mechanism_names
from ..modeling.registry import registered
from .bundle import (
    CONFIGURATION,
    DIGEST,
    MARK,
    MODELING,
    PROCESSING,
    Carried,
    bundle_files,
    library_files,
    processor_files,
    relative_imports,
    seal,
    unsealed,
    used_names,
)
from .flatten import PACKAGE_FOLDER


class Listed(NamedTuple):
    """A mechanism in a checkpoint's own list: the file that defines it has the name of the module."""

    kind: str
    name: str
    module: str
    cls: str


class Renewed(NamedTuple):
    """The code of a checkpoint as the installed package writes it."""

    files: dict[str, str]  # name to text, with the digest
    carried: set[str]  # the files of a user among them, which only the checkpoint has
    unknown: list[tuple[str, str]]  # kind and name of what neither the package nor the checkpoint has


def listed_mechanisms(files: dict[str, str]) -> list[Listed]:
    """Return what a checkpoint's own list of mechanisms names; no line of it runs."""
    if "mechanisms.py" not in files:
        return []
    nodes = list(ast.walk(parsed("mechanisms.py", files["mechanisms.py"])))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: node.module or "" for node in imports for alias in node.names}
    table: Any = next((node for node in nodes if isinstance(node, ast.Dict)), None)
    try:
        return [
            Listed(ast.literal_eval(kind), ast.literal_eval(name), modules[cls.id], cls.id)
            for kind, classes in zip(table.keys, table.values, strict=True)
            for name, cls in zip(classes.keys, classes.values, strict=True)
        ]
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError("mechanisms.py is not the list of mechanisms that hf_moe writes: it was changed.") from error


def parsed(name: str, text: str) -> ast.Module:
    """Return the syntax tree of a file of code; refuse what is no Python, by name."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is damaged: it is no Python code ({error}).") from error


def renew(config: Any, old: dict[str, str], with_processor: bool) -> Renewed:
    """Return the code that the installed package gives to a checkpoint.

    A user's mechanism that travels in the checkpoint alone is kept as it is there, with the files that it imports.
    `old` are the checkpoint's files of code, name to text.
    """
    listed = {(item.kind, item.name): item for item in listed_mechanisms(old)}
    mechanisms: dict[str, dict[str, type]] = {}
    carried, unknown = Carried(), []
    for kind, names in used_names(config).items():
        mechanisms[kind] = {}
        for name in names:
            item = listed.get((kind, name))
            if item is not None and item.module not in library_files() and not _is_users_own(kind, name):
                carried.classes.setdefault(kind, {})[name] = (item.module, item.cls)
                _collect(item.module, old, carried.files)
            elif name in mechanism_names(kind):
                mechanisms[kind][name] = get_mechanism(kind, name)
            else:
                unknown.append((kind, name))
    entries = [CONFIGURATION, MODELING, *([PROCESSING] if with_processor else [])]
    files = seal(bundle_files(entries, mechanisms, carried))
    return Renewed(files, set(carried.files), unknown)


def _is_users_own(kind: str, name: str) -> bool:
    """Return whether a mechanism of that name has been registered here, from outside the package."""
    cls = registered(kind).get(name)
    return cls is not None and not cls.__module__.startswith(f"{PACKAGE_FOLDER.name}.")


def _collect(module: str, old: dict[str, str], files: dict[str, str]) -> None:
    """Add a user's file, and those of the user's that it imports."""
    name = f"{module}.py"
    if name in files or module in library_files():
        return
    if name not in old:
        raise ValueError(f"{name}, which the checkpoint's mechanisms need, is missing from it.")
    text = unsealed(old[name])
    parsed(name, text)
    files[name] = text if text.startswith(f"{MARK}\n") else f"{MARK}\n{text}"
    for imported in relative_imports(text):
        _collect(imported, old, files)


def reasons_to_refresh(old: dict[str, str], renewed: Renewed) -> list[str]:
    """Return why the code of a checkpoint should be written anew, a sentence each."""
    reasons = []
    missing = sorted(set(renewed.files) - set(old))
    if missing:
        reasons.append(f"{', '.join(missing)} missing")
    changed = [name for name, text in renewed.files.items() if name in old and unsealed(old[name]) != unsealed(text)]
    if changed:
        reasons.append(f"{len(changed)} of {len(renewed.files)} files are not those of the installed version")
    reasons += dead_names(old)
    own = {name: text for name, text in old.items() if text.startswith(f"{MARK}\n")}
    if any(DIGEST not in text for name, text in own.items() if name not in processor_files()):
        reasons.append("files without the digest by which two checkpoints in one process are told apart")
    elif seal(own) != own:
        reasons.append("the digest in the files is not that of the files: one was changed after the save")
    return reasons


def dead_names(files: dict[str, str]) -> list[str]:
    """Return what files of code import from Transformers that the installed release does not have."""
    dead = []
    for name, text in sorted(files.items()):
        for node in ast.walk(parsed(name, text)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
            if isinstance(node, ast.ImportFrom) and module.startswith("transformers"):
                lost = [alias.name for alias in node.names if not _exists(module, alias.name)]
                if lost:
                    dead.append(f"{name} imports {', '.join(lost)} of {module}, which the installed release lacks")
    return dead


def _exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.util.find_spec(f"{module}.{name}"))
    except ImportError:
        return False
