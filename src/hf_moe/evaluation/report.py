"""One JSON file per run: what was run, with what, and the numbers."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    packages = {"hf_moe": "hf-moe", "torch": "torch", "transformers": "transformers"}
    found = {name: version(package) for name, package in packages.items()}
    return {**found, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores and accelerator."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_report(path: str | os.PathLike, *, config: dict[str, Any], seed: int, **numbers: Any) -> dict[str, Any]:
    """Write config, seed, versions, machine and numbers as JSON, whole or not at all, and return them.

    Raises:
        TypeError: if something in it is not JSON.
    """
    report = {**numbers, "config": config, "seed": seed, "versions": versions(), "machine": machine()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return report
