"""Prints the versions that a command runs on; with an option, the floor of a package or the set to commit.

python tools/versions.py
python tools/versions.py --floor transformers
python tools/versions.py --freeze > constraints.txt
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path


SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "huggingface-hub", "safetensors", "timm")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# torch names its own CUDA packages exactly, and other builds of it have others.
FROM_TORCH = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = """\
# The newest versions of everything on which all tests have passed. Written by `make upgrade`, used by the rest.
"""


def installed() -> str:
    """Return one line with the versions of what matters most and of the machine."""
    versions = {
        distribution.name.lower().replace("_", "-"): distribution.version for distribution in metadata.distributions()
    }
    # An overlay in front of the environment comes first on the path, and `metadata.version` finds that one.
    parts = [f"{name} {metadata.version(name)}" for name in SHOWN if name in versions]
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    return f"Python {platform.python_version()} ({machine}), " + ", ".join(parts)


def floor(package: str) -> str:
    """Return the oldest version of a package that pyproject.toml admits.

    Raises:
        SystemExit: if pyproject.toml gives no floor for it.
    """
    for requirement in PROJECT["dependencies"]:
        if found := re.fullmatch(rf"{re.escape(package)}>=([\d.]+).*", requirement):
            version = found[1]
            return version + ".0" * (2 - version.count("."))
    raise SystemExit(f"pyproject.toml gives no floor for {package}; its dependencies: {PROJECT['dependencies']}.")


def frozen() -> str:
    """Return what this environment holds, without the package itself, as constraints."""
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable", "--exclude", PROJECT["name"]]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # A file on the disk of one machine is no version of anything.
    pinned = [re.sub(r"\+.*", "", line) for line in lines if re.match(r"[\w.-]+==", line)]
    return HEADER + "\n".join(line for line in pinned if not FROM_TORCH.match(line)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--floor", metavar="PACKAGE", help="print the oldest version that pyproject.toml admits")
    choice.add_argument("--freeze", action="store_true", help="print what is installed, as constraints")
    args = parser.parse_args()
    print(
        floor(args.floor) if args.floor else frozen() if args.freeze else installed(), end="" if args.freeze else "\n"
    )


if __name__ == "__main__":
    main()
