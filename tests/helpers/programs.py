"""Programs of this package in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]


def start(program: str, *arguments, python: str = sys.executable, log=None, **environment: str) -> subprocess.Popen:
    """Start a module of `helpers` as a program, without network and without this process's settings of the Hub.

    All that it prints goes to the file `log` where one is given.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [python, "-m", f"helpers.{program}", *map(str, arguments)],
        env={**inherited, "HF_HUB_OFFLINE": "1", **environment, "PYTHONPATH": path},
        stdout=log or subprocess.PIPE,
        stderr=log or subprocess.PIPE,
        text=True,
    )


def last_line(process: subprocess.Popen) -> str:
    """Wait for a program that must succeed, and return the last line of its output."""
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return output.splitlines()[-1] if output else ""
