"""The evaluation files of a checkpoint: what was measured, for people, for the card and for the Hub.

`evaluation.json` holds the numbers of the report that the card shows. `.eval_results/<data set>.yaml` holds the scores
in the Hub's own format, which it shows on the model's page and on the data set's leaderboard.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    constants,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)


EVALUATION_FILE = "evaluation.json"
# A card shows these parts of a report; losses and routing tables stay with the run.
SHOWN = (
    "accuracy", "accuracy_by_question_type", "blind_accuracy", "base_accuracy", "base_accuracy_by_question_type",
    "evaluated", "train_seconds", "total_seconds", "peak_memory_gib", "parameters_total", "parameters_active",
    "trainable_parameters", "seed", "versions", "machine", "co2_eq_emissions",
)  # fmt: skip


def write_evaluation(folder: Path, report: dict[str, Any], datasets: Sequence[str]) -> dict[str, Any]:
    """Write the evaluation files into a checkpoint, those of an earlier report away, and return what they hold.

    `SHOWN` is taken from the report. The scores are listed under the first of the data sets; without any there is no
    file for the Hub.
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
            task_id=_task(kind),
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
    """Refuse a result of the card or of the Hub's files that is not in `evaluation.json`."""
    numbers = read_evaluation(folder)
    accuracies = scores(numbers)
    unknown = []
    for place, kind, stated in _claims(folder, accuracies):
        held = [accuracies[kind]] if kind in accuracies else list(_leaves(numbers))
        if stated not in {form for value in held for form in (value, f"{value:.4f}", f"{value:,}")}:
            unknown.append(f"{place}: {kind or 'all'} {stated}")
    if unknown:
        raise ValueError(
            f"{folder} states results that {EVALUATION_FILE} does not hold: {'; '.join(unknown)}. Write the card "
            "again with hf_moe.hub.card.write_card and the report of the run, or take the numbers out."
        )


def _claims(folder: Path, kinds: Iterable[str | None]) -> Iterator[tuple[str, str | None, Any]]:
    """Yield the results that the card and the Hub's files state: place, type of question, number or its print."""
    try:
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {folder / 'README.md'} is no YAML: {error}") from error
    section = re.search(r"^## Results$(.*?)(?=^## |\Z)", card.text, flags=re.DOTALL | re.MULTILINE)
    if section is not None:
        for label, shown in re.findall(r"^\| (.+?) +\| +([\d.,]+) +\|$", section[1], flags=re.MULTILINE):
            yield "README.md", None if label == "all" else label, shown
        for shown in re.findall(r"Measured on ([\d,]+) questions", section[1]):
            yield "README.md", "questions", shown
    metrics = {metric_name(kind): kind for kind in kinds}
    for result in card.data.eval_results or []:
        yield "README.md, metadata", metrics.get(result.metric_name, result.metric_name), result.metric_value
    tasks = {_task(kind): kind for kind in kinds}
    for path in sorted((folder / constants.EVAL_RESULTS_FOLDER).glob("*.yaml")):
        for entry in parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(folder)), tasks.get(entry.task_id, entry.task_id), entry.value


def metric_name(kind: str | None) -> str:
    """Return what the card's metadata calls the accuracy on a type of question, or on all."""
    return "Accuracy" if kind is None else f"Accuracy ({kind})"


def _task(kind: str | None) -> str:
    return "default" if kind is None else re.sub(r"\W+", "_", kind)


def _leaves(value: Any) -> Iterator[int | float]:
    """Yield the numbers of nested plain data."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, int | float):
        yield value
