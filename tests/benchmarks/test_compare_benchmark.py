"""The benchmark of systems: its recipes, and what a short run of it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe.training.recipe import load_recipe


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("task", ["shapes", "emoji"])
def test_its_recipes_fit_every_system_that_it_names(task, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    import compare

    rows = [f"data.{part}={{path: {tmp_path}}}" for part in ("train", "eval")]
    for system in {name for group in compare.GROUPS.values() for name in group}:
        own = [f"model.moe_config.{item}" for item in compare.OWN_FIELDS.get(system, [])]
        recipe = REPOSITORY / "benchmarks" / "recipes" / f"compare_{task}.yaml"
        load_recipe(str(recipe), [*rows, f"model.system={system}", *own])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_compares_two_systems(tmp_path):
    target = tmp_path / "compare.json"
    command = [sys.executable, "benchmarks/compare.py", "--quick", "--json", target, "--runs", tmp_path / "runs"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    result = json.loads(target.read_text())
    assert list(result["shapes"]["systems"]) == ["top_k", "moiie"] and "| `moiie` |" in done.stdout
    assert result["shapes"]["systems"]["moiie"]["runs"][0]["commit"] == result["commit"]
    assert (tmp_path / "runs" / "compare_shapes.png").is_file()
