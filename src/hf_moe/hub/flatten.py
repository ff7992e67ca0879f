"""Rewrites a source file for a checkpoint, where all code lies flat in one folder.

Transformers finds the files to copy with a regular expression that understands one form, `from .name import ...` at
the start of a line. Whatever a file imports is brought into that form, or refused with the remedy.
"""

import ast
import importlib
import re
import sys
from functools import lru_cache
from pathlib import Path

from ..modeling.mechanisms import FOLDERS


PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
TRAVELLING_FOLDERS = (PACKAGE_FOLDER / "configuration", PACKAGE_FOLDER / "modeling")
# Packaging, huggingface_hub and safetensors are requirements of Transformers.
ALLOWED_PACKAGES = (
    frozenset({"huggingface_hub", "packaging", "safetensors", "torch", "transformers"}) | sys.stdlib_module_names
)
# The processor opens pictures; Transformers' own image processors need these as well.
PICTURE_PACKAGES = frozenset({"PIL", "numpy"})

_KIND_OF_FOLDER = {PACKAGE_FOLDER / "modeling" / folder: kind for kind, folder in FOLDERS.items()}


def flat_name(path: Path) -> str:
    """Return the module name of a source file in a checkpoint: `router_moiie` for `modeling/routers/moiie.py`."""
    kind = _KIND_OF_FOLDER.get(path.parent)
    return path.stem if kind is None else f"{kind}_{path.stem}"


def flatten(path: Path) -> tuple[str, list[Path]]:
    """Return the text of a source file as a checkpoint has it, and the files it imports, which all travel."""
    text, imported = _flattened(path, path.read_text(encoding="utf-8"))
    return text, list(imported)


# A run saves many checkpoints, with the same files in each.
@lru_cache(maxsize=256)
def _flattened(path: Path, text: str) -> tuple[str, tuple[Path, ...]]:
    tree = ast.parse(text, filename=str(path))
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    edits: list[tuple[int, int, str]] = []
    imported: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_plain_import(alias.name, path, node)
        elif isinstance(node, ast.ImportFrom):
            targets = _targets(node, path)
            if not targets:
                continue
            imported += targets
            start = starts[node.lineno - 1] + node.col_offset
            indent = text[starts[node.lineno - 1] : start]
            if indent.strip():
                raise _refusal(path, node, "Transformers overlooks an import that does not start its line")
            source = ast.get_source_segment(text, node) or ""
            edits.append((start, start + len(source), _rewritten(source, targets, indent)))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text, tuple(imported)


def top_level_effects(path: Path) -> list[int]:
    """Return the lines of a file's top-level statements that do something when the file is imported."""
    lines = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        runs_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if runs_call or isinstance(node, ast.For | ast.While | ast.With | ast.Delete):
            lines.append(node.lineno)
    return lines


def _targets(node: ast.ImportFrom, path: Path) -> dict[Path, list[ast.alias]]:
    """Return the source files of an import and the names each gives; nothing for a package that is installed."""
    module = node.module or ""
    if node.level:
        if not module:
            raise _refusal(path, node, "write `from .name import ...` instead, the only relative form that travels")
        target = path.parents[node.level - 1].joinpath(*module.split(".")).with_suffix(".py")
        if not target.is_file():
            raise _refusal(path, node, f"there is no file {target.name}; import from the file that defines the name")
        return {target: node.names}
    top = module.partition(".")[0]
    if top == PACKAGE_FOLDER.name:
        return _package_targets(node, path)
    if _travels(top, path):
        return {}
    sibling = _sibling(module, path)
    if sibling is None:
        raise _refusal(path, node, f"{top} is not part of a checkpoint. {_REMEDY}")
    return {sibling: node.names}


def _travels(package: str, path: Path) -> bool:
    """Tell whether a checkpoint may count on a package where this file of it is run."""
    return package in ALLOWED_PACKAGES or (package in PICTURE_PACKAGES and PACKAGE_FOLDER in path.parents)


def _package_targets(node: ast.ImportFrom, path: Path) -> dict[Path, list[ast.alias]]:
    """Resolve names of this package, re-exported ones too, to the files that define them."""
    module = importlib.import_module(node.module or "")
    targets: dict[Path, list[ast.alias]] = {}
    for alias in node.names:
        defined_in = module
        if hasattr(module, "__path__"):
            name = getattr(getattr(module, alias.name, None), "__module__", None)
            defined_in = sys.modules.get(name or "", module)
        target = Path(str(defined_in.__file__))
        if target.name == "__init__.py" or not any(folder in target.parents for folder in TRAVELLING_FOLDERS):
            reason = f"{alias.name!r} does not travel: only hf_moe.modeling and hf_moe.configuration do"
            raise _refusal(path, node, reason)
        targets.setdefault(target, []).append(alias)
    return targets


def _sibling(module: str, path: Path) -> Path | None:
    """Return the file of an absolutely imported module if it lies beside `path`."""
    *packages, name = module.split(".")
    candidate = path.parent / f"{name}.py"
    beside = not packages or list(path.parent.parts[-len(packages) :]) == packages
    return candidate if beside and candidate.is_file() else None


def _rewritten(source: str, targets: dict[Path, list[ast.alias]], indent: str) -> str:
    if len(targets) == 1:
        head = f"from .{flat_name(*targets)} import"
        return re.sub(r"^from[\s\\]+[\w.\s\\]*?[\s\\]import\b", lambda _: head, source, count=1)
    return f"\n{indent}".join(
        f"from .{flat_name(target)} import {', '.join(map(ast.unparse, names))}" for target, names in targets.items()
    )


_REMEDY = (
    "Code that travels may import torch, transformers, the standard library, hf_moe and files beside it; copy what "
    "you need into such a file."
)


def _check_plain_import(module: str, path: Path, node: ast.Import) -> None:
    if _travels(module.partition(".")[0], path):
        return
    if module.partition(".")[0] == PACKAGE_FOLDER.name or _sibling(module, path) is not None:
        raise _refusal(path, node, f"write `from {module} import ...` instead, the only form that travels")
    raise _refusal(path, node, f"{module} is not part of a checkpoint. {_REMEDY}")


def _refusal(path: Path, node: ast.Import | ast.ImportFrom, reason: str) -> ValueError:
    return ValueError(f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot be bundled: {reason}")
