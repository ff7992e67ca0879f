"""What every benchmark shares: its options, the record of where it ran, interleaved timing, tables and files.

A full run is kept in `benchmarks/results/<name>.json`, and its tables stand in `benchmarks/README.md`.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_moe.evaluation.report import machine


FOLDER = Path(__file__).resolve().parent
PACKAGES = ("hf-moe", "torch", "transformers", "accelerate", "peft", "datasets")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result; a full run without it "
                        "is kept in benchmarks/results/ and in the tables of benchmarks/README.md")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute: for the tests")
    return parser


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the commit of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "machine": {
            **machine(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """Return the commit of the repository, with `+changes` where tracked files differ from it."""
    describe = ["git", "-C", str(FOLDER), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def interleaved_ms(
    runs: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time every run `repetitions` times, interleaved: a slow moment of the machine meets all of them alike.

    The order is drawn anew each time, since a run finds the memory and the caches as its predecessor left them.

    Args:
        runs: name -> what is timed.
        repetitions: how often.
        clock: returns seconds, those of the wall or, with `time.process_time`, of this process.

    Returns:
        name -> milliseconds of every repetition, after one that warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name in random.sample(list(runs), len(runs)):
            start = clock()
            runs[name]()
            if repetition > 0:
                times[name].append(1000 * (clock() - start))
    return times


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks, as the allocators usual in training (jemalloc, tcmalloc, CUDA's) do.

    By default it returns them to the system, and the time of a step is then largely that of page faults, which meet
    the contestants at random.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def median(values: Iterable[float]) -> float:
    """Return the median with four significant digits, as results are stored."""
    return float(f"{statistics.median(values):.4g}")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table with the keys of the first as its head."""
    head = list(rows[0])
    body = [[f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in head] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def publish(name: str, arguments: argparse.Namespace, result: dict[str, Any], tables: str) -> None:
    """Print the tables and write the result with its environment, a full run also into the kept files."""
    print(tables)
    full = {"benchmark": name, "quick": arguments.quick, "seeds": arguments.seeds, **environment(), **result}
    kept = None if arguments.quick else FOLDER / "results" / f"{name}.json"
    target = arguments.json or kept
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(full, indent=2) + "\n")
    if target == kept and kept is not None:
        write_section(name, f"{ran_on(full)}\n\n{tables}")


def ran_on(result: dict[str, Any]) -> str:
    """Return one sentence on where a result comes from."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {result['commit']}, {result['date']}."
    )


def write_section(name: str, text: str) -> None:
    """Replace what stands between the two markers of `name` in `benchmarks/README.md`.

    Raises:
        ValueError: if the file has no such markers.
    """
    readme = FOLDER / "README.md"
    content = readme.read_text()
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if begin not in content or end not in content:
        raise ValueError(f"{readme} needs the lines {begin.strip()!r} and {end!r} to hold the tables of {name!r}.")
    before, rest = content.split(begin, 1)
    readme.write_text(before + begin + text.strip() + "\n" + end + rest.split(end, 1)[1])
