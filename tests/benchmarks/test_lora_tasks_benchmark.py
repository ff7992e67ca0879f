"""The benchmark of contradicting tasks: what its contestants share, and that it runs and reads what is finished."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("lora_tasks_benchmark", FOLDER / "lora_tasks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module, "keep_freed_memory", lambda: None)  # it would hold for the whole test process
        yield module


@pytest.fixture(scope="module")
def quick(benchmark, tmp_path_factory):
    """Run the benchmark on a tiny base; return the folder of its runs and its result."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--quick", "--runs", str(folder), "--json", str(folder / "result.json")]
        patch.setattr(sys, "argv", ["lora_tasks.py", *arguments])
        benchmark.main()
    return folder, json.loads((folder / "result.json").read_text())


def test_all_contestants_run_with_equal_trainable_parameters_but_for_the_routers(quick):
    cells = {row["contestant"]: row for row in quick[1]["rows"]}
    single = cells["lora"]["trainable"]
    assert cells["condition"]["trainable"] == single == 2 * cells["alone_truth"]["trainable"]
    for learned in ("token", "sequence"):
        assert cells[learned]["trainable"] - cells[learned]["routers"] == single
        assert cells[learned]["routers"] == 2 * 2 * 32
    assert all(0 <= cells[arm][task] <= 1 for arm in ("lora", "token", "sequence") for task in ("truth", "lie"))
    assert "lie" not in cells["alone_truth"]


def test_the_table_has_a_line_for_every_contestant(benchmark, quick):
    lines = benchmark.summary(quick[1]["rows"]).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["the base itself", "lora", "token", "sequence", "condition", "alone"]


def test_what_is_compared_differs_in_nothing_but_the_adapter_and_the_rows(benchmark):
    recipes = {arm: benchmark.cell_recipe(arm, 1, []).to_dict() for arm in benchmark.ARMS}
    for arm in ("token", "sequence", "condition"):
        assert {**recipes[arm], "adapter": None} == {**recipes["lora"], "adapter": None}
    alone = recipes["alone_lie"]
    assert alone["training"] == {**recipes["lora"]["training"], "per_device_train_batch_size": benchmark.ROWS // 2}
    assert recipes["lora"]["training"]["per_device_train_batch_size"] == benchmark.ROWS
    assert alone["data"]["train"]["where"] == {"question_type": "lie"}
    scalings = {recipe["adapter"]["lora_alpha"] / recipe["adapter"]["r"] for recipe in recipes.values()}
    assert scalings == {2.0}


def test_a_finished_cell_is_read_and_run_again_only_if_its_recipe_has_changed(benchmark, quick, monkeypatch):
    folder, result = quick
    calls = []

    def run(recipe, path):
        calls.append(path)
        return json.loads((path / "report.json").read_text())

    monkeypatch.setattr(benchmark, "run_recipe", run)
    base = benchmark.tiny_base(folder / "quick" / "base")
    runs = folder / "quick"
    assert benchmark.cell("token", 0, runs, base) == next(r for r in result["rows"] if r["contestant"] == "token")
    assert not calls
    benchmark.cell("token", 0, runs, [*base, "training.learning_rate=1.0"])
    assert calls == [runs / "token-0"]
