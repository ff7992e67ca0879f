"""The evaluation files of a checkpoint: what was measured, for people, for the card and for the Hub.

`evaluation.json` holds the numbers of the report that the card shows. `.eval_results/<data set>.yaml` holds the scores
in the Hub's own format, which it shows on the model's page and on the data set's leaderboard.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, constants, eval_result_entries_to_yaml


EVALUATION_FILE = "evaluation.json"
# What a card may show of a report; the rest (losses, routing tables) stays with the run.
SHOWN = (
    "accuracy",
    "accuracy_by_question_type",
    "blind_accuracy",
    "evaluated",
    "train_seconds",
    "total_seconds",
    "peak_memory_gib",
    "parameters_total",
    "parameters_active",
    "seed",
    "versions",
)


def write_evaluation(folder: Path, report: dict[str, Any], datasets: Sequence[str]) -> dict[str, Any]:
    """Write the evaluation files into a checkpoint, those of an earlier report away, and return what they hold.

    Args:
        folder: the checkpoint.
        report: of the run; see `SHOWN` for what is taken from it.
        datasets: the scores are listed under the first one; without any there is no file for the Hub.
    """
    shutil.rmtree(folder / constants.EVAL_RESULTS_FOLDER, ignore_errors=True)
    numbers = {name: report[name] for name in SHOWN if name in report}
    path = folder / EVALUATION_FILE
    if not numbers:
        path.unlink(missing_ok=True)
        return {}
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    numbers = read_evaluation(folder)
    entries = [
        EvalResultEntry(
            dataset_id=datasets[0],
            task_id="default" if kind is None else re.sub(r"\W+", "_", kind),
            value=value,
            notes="accuracy" if kind is None else f"accuracy, questions of type {kind}",
        )
        for kind, value in scores(numbers).items()
        if datasets
    ]
    if entries:
        target = folder / constants.EVAL_RESULTS_FOLDER / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', datasets[0])}.yaml"
        target.parent.mkdir()
        target.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return numbers


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return what `evaluation.json` holds; nothing where there is none."""
    path = folder / EVALUATION_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def scores(numbers: dict[str, Any]) -> dict[str | None, float]:
    """Return the accuracies: over all questions under `None`, then by type of question."""
    overall = {None: numbers["accuracy"]} if "accuracy" in numbers else {}
    return {**overall, **numbers.get("accuracy_by_question_type", {})}


def check_evaluation(folder: Path) -> None:
    """Check that every result of the card and of the Hub's files stands in `evaluation.json`.

    Raises:
        ValueError: naming the file, the number, and what to do.
    """
    known = list(_leaves(read_evaluation(folder)))
    shown = {f"{value:.4f}" for value in known} | {f"{value:,}" for value in known}
    unknown = [f"README.md: {number}" for number in _card_numbers(folder) if number not in shown]
    try:
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {folder / 'README.md'} is no YAML: {error}") from error
    for result in card.data.eval_results or []:
        if result.metric_value not in known:
            unknown.append(f"README.md, metadata: {result.metric_name} {result.metric_value}")
    for path in sorted((folder / constants.EVAL_RESULTS_FOLDER).glob("*.yaml")):
        for item in yaml.safe_load(path.read_text(encoding="utf-8")):
            if item["value"] not in known:
                unknown.append(f"{path.relative_to(folder)}: {item['value']}")
    if unknown:
        raise ValueError(
            f"{folder} states results that {EVALUATION_FILE} does not hold: {'; '.join(unknown)}. Write the card "
            "again with hf_moe.hub.card.write_card and the report of the run, or take the numbers out."
        )


def _card_numbers(folder: Path) -> list[str]:
    """Return the scores and counts in the card's section on results, as they are printed."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Results$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    if section is None:
        return []
    cells = re.findall(r"\|\s*([\d.,]+)\s*\|\s*$", section[1], flags=re.MULTILINE)
    return cells + re.findall(r"Measured on ([\d,]+) questions", section[1])


def _leaves(value: Any) -> Iterator[int | float]:
    """Yield the numbers of nested plain data."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, int | float):
        yield value
