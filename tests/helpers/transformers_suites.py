"""Transformers' own test suites, from the source distribution of the installed release."""

import importlib
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import transformers


CACHE = Path(__file__).parents[2] / ".cache"
PACKAGE = "transformers_common_tests"
UNREACHABLE = ("No matching distribution found", "Failed to establish a new connection", "Temporary failure in name")


def import_suite(module: str) -> types.ModuleType:
    """Import a module of the installed release's `tests`, fetching them once."""
    name = f"transformers-{transformers.__version__}"
    folder = CACHE / name / "tests"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        fetched = subprocess.run(
            [*command, f"transformers=={transformers.__version__}", "--dest", str(CACHE)],
            capture_output=True,
            text=True,
        )
        if any(symptom in fetched.stderr for symptom in UNREACHABLE):
            pytest.skip(
                "TRANSFORMERS' COMMON MODEL TESTS DID NOT RUN: the package registry cannot be reached for the source "
                f"distribution of {name}.",
                allow_module_level=True,
            )
        assert fetched.returncode == 0, fetched.stderr
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            wanted = [item for item in archive.getmembers() if item.name.startswith(f"{name}/tests/")]
            archive.extractall(CACHE, wanted, filter="data")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    # Two mixins live in folders that the source distribution leaves out.
    for path, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        stub = types.ModuleType(f"{PACKAGE}.{path}")
        setattr(stub, mixin, type(mixin, (), {}))
        sys.modules[f"{PACKAGE}.{path.split('.')[0]}"] = types.ModuleType(f"{PACKAGE}.{path.split('.')[0]}")
        sys.modules[f"{PACKAGE}.{path}"] = stub
    # What this fetches ahead of time for Transformers' CI is fetched nowhere here.
    stub = types.ModuleType("fetch_hub_objects_for_ci")
    stub.url_to_local_path = lambda url: url
    sys.modules[stub.__name__] = stub
    return importlib.import_module(f"{PACKAGE}.{module}")
