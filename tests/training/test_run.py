"""The demo's recipe from its first line to its report, shortened."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


SHORT = [
    "training.max_steps=30",
    "training.warmup_steps=3",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=10",
    "data.train.limit=32",
    "data.eval.limit=16",
    "model.image_size=64",
    "evaluation={batch_size: 8, blind: true, generated: 4}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_recipe(load_recipe("easyvqa_demo", SHORT), folder)


def test_the_report_holds_what_it_promises(run):
    folder, report = run
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {"accuracy", "blind_accuracy", "accuracy_by_question_type", "train_seconds", "total_seconds"} < set(report)
    assert report["evaluated"] == 16 and 0 <= report["accuracy"] <= 1
    assert report["generation_agrees"] == 1.0
    assert set(report["parameters_active"]) == {"text", "image"}
    assert report["parameters_active"]["text"] < report["parameters_total"]
    assert report["peak_memory_gib"] > 0.1 and report["seed"] == 0
    assert {"torch", "transformers", "hf_moe", "python"} <= set(report["versions"])
    assert report["config"]["training"]["max_steps"] == 30


def test_the_checkpoint_is_complete(run):
    folder, _ = run
    files = {path.name for path in (folder / "checkpoint").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "routing.png",
        "modeling_hf_moe.py",
        "router_moiie.py",
    } <= files
    assert "router_top_k.py" not in files


def test_the_checkpoint_answers_without_the_package(run):
    folder, _ = run
    script = "scripts/ask_without_hf_moe.py"
    result = subprocess.run([sys.executable, script, folder / "checkpoint"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("->") == 4


def test_the_benchmark_reads_a_finished_run_of_the_same_recipe_only(run, monkeypatch):
    folder, report = run
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    spec = importlib.util.spec_from_file_location("easyvqa_benchmark", benchmarks / "easyvqa.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.finished(load_recipe("easyvqa_demo", SHORT), folder) == json.loads(json.dumps(report))
    assert benchmark.finished(load_recipe("easyvqa_demo", [*SHORT, "seed=1"]), folder) is None
    row = {"seed": 0, "steps": 2, "loss_curve": [[1, 3.0], [2, 2.5]], **report}
    lines = benchmark.table([row, {**row, "seed": 1, "accuracy": report["accuracy"] + 0.5}]).splitlines()
    assert lines[2].startswith("| 0 | 2 |") and lines[2].endswith("| 2.500 |")
    assert "spread 0.5000 over 2 seeds" in lines[-1]
