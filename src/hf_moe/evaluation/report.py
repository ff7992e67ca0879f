"""One JSON file per run: what was run, with what, and the numbers."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    packages = {"hf_moe": "hf-moe", "torch": "torch", "transformers": "transformers"}
    found = {name: version(package) for name, package in packages.items()}
    return {**found, "python": platform.python_version()}


def write_report(path: str | os.PathLike, *, config: dict[str, Any], seed: int, **numbers: Any) -> dict[str, Any]:
    """Write config, seed, versions and numbers as JSON, whole or not at all, and return them.

    Raises:
        TypeError: if something in it is not JSON.
    """
    report = {**numbers, "config": config, "seed": seed, "versions": versions()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return report
