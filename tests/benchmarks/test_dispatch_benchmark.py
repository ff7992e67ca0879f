"""The dispatch benchmark runs and writes what its readers look for."""

import json
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_benchmark_writes_the_named_keys(tmp_path):
    target = tmp_path / "dispatch.json"
    command = [sys.executable, "benchmarks/dispatch.py", "--quick", "--json", str(target)]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    result = json.loads(target.read_text())
    assert {"machine", "versions", "commit", "rows"} <= set(result)
    keys = {"tokens", "hidden", "intermediate", "experts", "top_k", "dtype", "mode", "empty_share"}
    times = {"ragged_ms", "grouped_mm_ms", "eager_ms", "dense_ms"}
    assert all(keys | times == set(row) and all(row[key] > 0 for key in times) for row in result["rows"])
    covered = {(row["dtype"], row["mode"], row["empty_share"]) for row in result["rows"]}
    assert len(covered) == 12
    assert "ragged / grouped_mm" in printed
    assert [step["dtype"] for step in result["training_step"]] == ["float32", "bfloat16", "autocast"]
    assert all(step[key] > 0 for step in result["training_step"] for key in times)


def test_new_routings_are_measured_beside_repeated_ones(tmp_path):
    target = tmp_path / "new_routings.json"
    command = [sys.executable, "benchmarks/new_routings.py", "--quick", "--json", str(target)]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    rows = json.loads(target.read_text())["rows"]
    assert {(row["dtype"], row["backend"]) for row in rows} == {
        (dtype, backend)
        for dtype in ("float32", "bfloat16", "autocast")
        for backend in ("ragged", "grouped_mm", "eager")
    }
    assert all(row[f"{name}_ms"] > 0 for row in rows for name in ("new", "repeated", "dense", "first_new"))
    assert "new / repeated" in printed
