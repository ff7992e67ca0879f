"""The demo's recipe from its first line to its report, shortened."""

import json
import subprocess
import sys

import pytest

from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


SHORT = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=1",
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
    assert report["config"]["training"]["max_steps"] == 2


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
