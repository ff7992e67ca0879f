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
    of_models = [group for name, group in compare.GROUPS.items() if name != "compare_adapters"]
    for system in {name for group in of_models for name in group}:
        own = [f"model.moe_config.{item}" for item in compare.OWN_FIELDS.get(system, [])]
        recipe = REPOSITORY / "benchmarks" / "recipes" / f"compare_{task}.yaml"
        load_recipe(str(recipe), [*rows, f"model.system={system}", *own])


def test_its_recipe_of_adapters_names_no_system_of_its_own(tmp_path):
    rows = [f"data.{part}={{path: {tmp_path}}}" for part in ("train", "eval")]
    given = [*rows, f"model.base={tmp_path}"]
    recipe = load_recipe(str(REPOSITORY / "benchmarks" / "recipes" / "compare_adapters.yaml"), given)
    assert recipe.adapter.keys() == {"model_part", "target_modules"}


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
