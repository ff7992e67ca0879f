"""The benchmark of EvoMoE: what its variants share and differ in, and that it runs and reads what is finished."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    folder = REPOSITORY / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("evomoe_benchmark", folder / "evomoe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_variants_of_a_seed_differ_in_the_last_stage_only(benchmark):
    everything = {**benchmark.VARIANTS, **benchmark.MATCHED, **benchmark.DENSE, **benchmark.ALTERNATIVES}
    recipes = {name: benchmark.make_recipe(name, stage, 1, False).to_dict() for name, stage in everything.items()}
    in_warm_up = recipes.pop("evolved in the warm-up")["stages"]
    reference = recipes["evomoe"]
    assert recipes.pop("dense before the last stage")["stages"] == reference["stages"][:2]
    last_stages = {}
    for name, recipe in recipes.items():
        assert recipe["stages"][:2] == reference["stages"][:2], name
        assert {**recipe, "stages": None} == {**reference, "stages": None}
        last = recipe["stages"][2]
        assert last["training"] == reference["stages"][2]["training"]
        last_stages[last.pop("name")] = json.dumps(last)
    assert len(set(last_stages.values())) == len(recipes)
    steps = [sum(stage["training"]["max_steps"] for stage in stages) for stages in (in_warm_up, reference["stages"])]
    assert steps[0] == steps[1]


def row(seed: int, accuracy: float) -> dict:
    trained, active = {"routers": 2_000_000}, {"text": 1_500_000}
    return {"seed": seed, "accuracy": accuracy, "parameters_trained": trained, "parameters_active": active}


def test_a_variant_is_compared_with_the_baseline_seed_by_seed(benchmark):
    baseline = [row(0, 0.80), row(1, 0.90)]
    line = benchmark.summary("evomoe", [row(0, 0.83), row(1, 0.88)], baseline)
    assert line["accuracy %, by seed"] == "83.0 88.0"
    assert (line["mean"], line["spread"]) == ("85.50", "5.00")
    assert line["against baseline"] == "+0.50 (-2.0 to +3.0)"
    assert line["modality JS, bits"] == "–"


@pytest.mark.slow  # ten trainings; the stages and the measures have tests of their own
def test_the_benchmark_runs_and_a_second_run_reads_what_is_finished(tmp_path):
    target, runs = tmp_path / "evomoe.json", tmp_path / "runs"
    command = [sys.executable, "benchmarks/evomoe.py", "--quick", "--json", target, "--runs", runs]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    result = json.loads(target.read_text())
    assert set(result["variants"]) == {"evomoe", "replicated_linear", "evolution_only", "dtr_only"}
    keys = {"seed", "accuracy", "expert_cosine", "modality_js", "shuffle_loss_change"}
    assert all(keys <= set(row) for rows in result["variants"].values() for row in rows)
    assert [[row["seed"] for row in rows] for rows in result["dense"].values()] == [[0], [0]]
    cost = {row["router"]: row for row in result["router_cost"]}
    # h = 16, r = 8, d = 128, four experts: W1, both halves of W2, both static adapters, the scorer.
    assert cost["evomoe_dtr"]["multiply_adds_per_token"] == 16 * 128 + 2 * 16 * 8 * 128 + 2 * 8 * 128 + 4 * 128
    assert cost["top_k"]["multiply_adds_per_token"] == 4 * 128
    assert "| replicated_linear |" in printed and "| evolved in the warm-up |" in printed
    for picture in ("evomoe_similarity.png", "evomoe_modalities.png"):
        assert 1_000 < (runs / picture).stat().st_size < 100_000
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")}
    assert len(before) == 9
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads(target.read_text())["variants"] == result["variants"]
