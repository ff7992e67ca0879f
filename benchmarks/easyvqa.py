"""Accuracy, time and loss curve of the recipes on easy-VQA.

    python benchmarks/easyvqa.py --recipe easyvqa_demo --seeds 3
    python benchmarks/easyvqa.py --recipe smollm2_easyvqa

Seed N of a recipe runs in `runs/<name>-seed<N>` (seed 0 in `runs/<name>`, where `make demo` and `hf-moe train` leave
theirs); a finished run of the same recipe is read, not run again.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from common import make_parser, publish

from hf_moe.training.recipe import Recipe, load_recipe
from hf_moe.training.run import run_recipe


QUICK = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=8",
    "data.train.limit=32",
    "data.eval.limit=16",
    "model.image_size=64",
]


def finished(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return the report in `folder` if it is of this recipe."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(recipe.to_dict()))
    # A field that a later version of the package added is not in an older report.
    return report if all(asked.get(field) == value for field, value in report["config"].items()) else None


def run_seed(name: str, seed: int, quick: bool, root: Path) -> dict[str, Any]:
    """Run one seed, or read what an earlier run of it has left, and return what is kept of it."""
    recipe = load_recipe(name, [f"seed={seed}", *(QUICK if quick else [])])
    folder = root / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}")
    report = (None if quick else finished(recipe, folder)) or run_recipe(recipe, folder)
    curve = loss_curve([stage["log_history"] for stage in report.get("stages", [report])])
    kept = ("accuracy", "accuracy_by_question_type", "blind_accuracy", "evaluated", "train_seconds", "total_seconds")
    return {
        "seed": seed,
        "steps": curve[-1][0],
        **{key: report[key] for key in (*kept, "peak_memory_gib", "parameters_total", "parameters_active")},
        "loss_curve": curve,
    }


def loss_curve(histories: list[list[dict[str, Any]]]) -> list[list[float]]:
    """Return step and loss of every log, with the steps of successive stages counted on."""
    curve: list[list[float]] = []
    for history in histories:
        before = curve[-1][0] if curve else 0
        curve += [[before + entry["step"], round(float(entry["loss"]), 4)] for entry in history if "loss" in entry]
    return curve


def table(rows: list[dict[str, Any]]) -> str:
    """Return the seeds as a table, with the mean and the spread (largest minus smallest) of the accuracy."""
    types = sorted(rows[0]["accuracy_by_question_type"])
    head = ["seed", "steps", "accuracy", *types, "blind", "questions", "training s", "GiB", "final loss"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        by_type = [f"{row['accuracy_by_question_type'][name]:.3f}" for name in types]
        counts = [str(row["evaluated"]), f"{row['train_seconds']:.0f}", f"{row['peak_memory_gib']:.1f}"]
        scores = [f"{row['accuracy']:.4f}", *by_type, f"{row['blind_accuracy']:.3f}"]
        lines.append([str(row["seed"]), str(row["steps"]), *scores, *counts, f"{row['loss_curve'][-1][1]:.3f}"])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    accuracies = [row["accuracy"] for row in rows]
    spread = max(accuracies) - min(accuracies)
    return f"{text}\n\nMean accuracy {statistics.mean(accuracies):.4f}, spread {spread:.4f} over {len(rows)} seeds."


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="easyvqa_demo", help="easyvqa_demo (default) or smollm2_easyvqa")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    arguments = parser.parse_args()
    rows = [run_seed(arguments.recipe, seed, arguments.quick, arguments.runs) for seed in range(arguments.seeds)]
    publish(arguments.recipe, arguments, {"recipe": arguments.recipe, "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
