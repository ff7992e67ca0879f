"""Holds the package to its list of names of other libraries that may go without notice, `private_names.yaml`.

python tools/private_names.py

Fails for a use that is not listed, an entry that nothing uses any more, and a name that the installed versions lack.
A use is found in the syntax tree: an import of a private name or of one that its library does not export; a private
attribute, keyword or key that the package does not define, also as a string; a private attribute that the package sets
and never reads, which someone else must; and one that it defines over a base class of another library.
"""

import ast
import importlib
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
LIST = Path(__file__).with_suffix(".yaml")
LIBRARIES = ("accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "timm", "torch", "transformers", "trl")
# torch documents its submodules; the others export what they promise from their top.
EXPORTING = ("huggingface_hub", "peft", "transformers", "trl")
BY_STRING = ("getattr", "hasattr", "setattr", "delattr")


@dataclass(frozen=True)
class Entry:
    """One listed name.

    Attributes:
        name: the name.
        where: the module or class that holds it, or the module that reads it.
        why: what the package needs it for.
        when_gone: what to do then.
    """

    name: str
    where: str
    why: str
    when_gone: str

    @property
    def library(self) -> str:
        return self.where.partition(".")[0]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")


def entries() -> list[Entry]:
    """Return the list, one entry per name."""
    groups = yaml.safe_load(LIST.read_text(encoding="utf-8"))["names"]
    return [
        Entry(name, group["where"], group["why"], group["when_gone"]) for group in groups for name in group["names"]
    ]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what is imported from the libraries and is private or not exported, as `module.name`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in found:
            library, _, rest = path.partition(".")
            if library in LIBRARIES and rest and not _is_promised(library, rest):
                yield path, node.lineno


def _is_promised(library: str, rest: str) -> bool:
    if any(is_private(part) for part in rest.split(".")):
        return False
    return library not in EXPORTING or hasattr(importlib.import_module(library), rest.rpartition(".")[2])


def attributes(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Yield every private attribute that is read or set, with its line and whether it is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno, isinstance(node.ctx, ast.Load)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_STRING:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield name.value, node.lineno, node.func.id in ("getattr", "hasattr")
        elif isinstance(node, ast.Call):
            yield from ((item.arg, node.lineno, True) for item in node.keywords if item.arg and is_private(item.arg))
        elif isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            names = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            # `("", "_bias")` and `("bias", "_bias")` hold endings of names, not names.
            names = [name for name in names if is_private(name) and not {"", name[1:]} & set(names)]
            yield from ((name, node.lineno, True) for name in names if name.isidentifier())


def definitions(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Yield the private names that classes define in their bodies or on `self`: class, name and line."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.FunctionDef):
                found = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            yield from ((cls.name, name, node.lineno) for name in found if is_private(name))
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    yield cls.name, node.attr, node.lineno


def overrides(module: str, cls: str, name: str) -> bool:
    """Whether a class of the package has a base in another library that knows `name` too."""
    found = getattr(importlib.import_module(module), cls, None)
    foreign = (base for base in getattr(found, "__mro__", ()) if base.__module__.partition(".")[0] in LIBRARIES)
    return any(name in vars(base) or name in vars(base).get("__annotations__", {}) for base in foreign)


def mentions(source: Path = SOURCE) -> set[str]:
    """Return every private name that the package reads, sets or defines."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in source.rglob("*.py")]
    read_or_set = {name for tree in trees for name, _, _ in attributes(tree)}
    return read_or_set | {name for tree in trees for _, name, _ in definitions(tree)}


def uses(source: Path = SOURCE) -> dict[str, list[str]]:
    """Return the names of other libraries that are used, by path where imported, with the places of their uses."""
    found: dict[str, list[str]] = defaultdict(list)
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(source.rglob("*.py"))}
    defined = {name for tree in trees.values() for _, name, _ in definitions(tree)}
    functions = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    read = Counter(name for tree in trees.values() for name, _, is_read in attributes(tree) if is_read)
    for path, tree in trees.items():
        place = path.relative_to(source)
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        for name, line in imported_names(tree):
            found[name].append(f"{place}:{line}")
        for name, line, _ in attributes(tree):
            if name not in defined | functions:
                found[name].append(f"{place}:{line}")
        for cls, name, line in definitions(tree):
            if not read[name] or overrides(module, cls, name):
                found[name].append(f"{place}:{line}")
    return dict(found)


def exists(entry: Entry) -> bool:
    """Whether the installed version has the name, or reads it, where the list says."""
    holder = _resolve(entry.where)
    if holder is None:
        return False
    if hasattr(holder, entry.name) or _resolve(f"{entry.where}.{entry.name}") is not None:
        return True
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(holder) or holder))
    except (OSError, TypeError):
        return False
    fields = ("attr", "value", "arg", "name")
    return any(entry.name == getattr(node, field, None) for node in ast.walk(tree) for field in fields)


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return None
            found = getattr(found, part)
        return found
    return None


def problems(source: Path = SOURCE) -> list[str]:
    """Return what is wrong between the package, the list and the installed versions, one line each."""
    listed, used = entries(), uses(source)
    mentioned = {*used, *mentions(source)}
    known = {key for entry in listed for key in (entry.name, f"{entry.where}.{entry.name}")}
    lines = [
        f"{name} is not in {LIST.name}; used in {', '.join(places)}"
        for name, places in sorted(used.items())
        if name not in known
    ]
    for entry in listed:
        path = f"{entry.where}.{entry.name}"
        if not mentioned & {entry.name, path}:
            lines.append(f"{path} is listed, and nothing uses it")
        elif not exists(entry):
            version = metadata.version(entry.library.replace("_", "-"))
            lines.append(f"{path} is gone from {entry.library} {version}. {entry.when_gone}")
    return lines


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or f"{len(entries())} names, all listed, used and there.")
    sys.exit(bool(found))
