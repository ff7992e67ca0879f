"""A recipe at work, and its end: weights first, then whatever else may fail."""

import json
import logging
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from ..data.text import tokenizer_or_processor
from ..data.tokenisation import check_conversations
from ..evaluation.report import write_report
from ..evaluation.vqa import check_references
from .parts import fingerprints, moved_parameters
from .resuming import newest_whole_checkpoint, weights_damage
from .sections import Recipe


logger = logging.getLogger(__name__)

RECORD_FILE = "training.json"
STAGE_FILE = "stage.json"
CHECKPOINT = "checkpoint"
REHEARSED_ROWS = 2


def say(what: str) -> None:
    """Show what a run is at, beside the progress bars; what it prints stays for its results."""
    print(what, file=sys.stderr, flush=True)


class Job(ABC):
    """What a recipe trains on the rows `train`, and what the end of its run, which may score `eval`, needs to know."""

    def __init__(self, recipe: Recipe, rows: dict[str, Any], folder: Path):
        self.recipe = recipe
        self.rows = rows
        self.folder = folder
        self.model: Any = None
        self.processor: Any = None

    @abstractmethod
    def build(self) -> None:
        """Make the model and its processor, and compute the features of the images."""

    @abstractmethod
    def open(self, folder: Path) -> None:
        """Take the trained model from its folder, in place of building and training it."""

    @abstractmethod
    def train(self, resume: bool) -> dict[str, Any]:
        """Train, and return what the report says of it."""

    def save(self, folder: Path) -> None:
        """Write the weights and all that belongs to them."""
        self.model.save_pretrained(folder)
        tokenizer_or_processor(self.processor).save_pretrained(folder)

    @abstractmethod
    def save_settings(self, folder: Path) -> None:
        """Write what [`save`] does, without the weights."""

    @abstractmethod
    def score(self, rows: Any) -> dict[str, Any]:
        """Return what the report says of the answers to `rows`."""

    @abstractmethod
    def describe(self, folder: Path, report: dict[str, Any]) -> None:
        """Write the card, and pictures, into a saved folder."""


def rehearse(job: Job) -> None:
    """Go through the end of a run on two rows, and read all questions, before hours of training depend on them.

    Raises:
        OSError: if the folder of the run cannot be written, or has no room for the weights.
        ValueError: if an answer or a question cannot be read.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in job.model.parameters())
    if job.recipe.adapter is None and shutil.disk_usage(job.folder).free < needed:
        raise OSError(f"{job.folder} has no room for the checkpoint, which takes {needed / 2**20:,.0f} MiB.")
    sample = None
    if (questions := job.rows.get("eval")) is not None:
        if isinstance(questions, Dataset):
            check_references(questions)
            check_conversations(questions, job.processor, train=False)
        sample = questions.take(REHEARSED_ROWS)
    with TemporaryDirectory(prefix=".rehearsal-", dir=job.folder) as scratch:
        (checkpoint := Path(scratch) / CHECKPOINT).mkdir()
        job.save_settings(checkpoint)
        finish(job, {"train_seconds": 0.0, "log_history": []}, time.perf_counter(), sample, Path(scratch))


def save_weights(job: Job, record: dict[str, Any], started: float) -> dict[str, Any]:
    """Put the trained model in place, and then the record by which `--resume` knows that it is trained."""
    target, fresh = job.folder / CHECKPOINT, job.folder / f"{CHECKPOINT}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    job.save(fresh)
    # The numbers and the card of an earlier run do not belong to these weights.
    shutil.rmtree(target, ignore_errors=True)
    (job.folder / "report.json").unlink(missing_ok=True)
    fresh.rename(target)
    record = {**record, "seconds": time.perf_counter() - started}
    write_record(job.folder / RECORD_FILE, trained_by(job.recipe), record)
    return record


def write_record(path: Path, job: dict[str, Any], record: dict[str, Any]) -> None:
    """Write the record of a finished training, which is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"job": job, "record": record}), encoding="utf-8")
    partial.replace(path)


def read_record(path: Path, job: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the record of a finished training.

    Raises:
        ValueError: if it is of another job.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in job.items() if content["job"].get(name) != value]
    if changed:
        raise ValueError(
            f"The finished {what} in {path.parent} was another: its {' and '.join(changed)} differ from the recipe's. "
            "Restore the recipe, or start over without resuming."
        )
    return content["record"]


def finish(job: Job, record: dict[str, Any], started: float, rows: Any, folder: Path) -> dict[str, Any]:
    """Score a trained model, write the report and the card, and return the report.

    Args:
        record: of the training.
        started: when this run began its part, on the clock of `time.perf_counter`.
        rows: to score; `None` where there are none.
        folder: of the report; it holds the checkpoint.
    """
    import resource  # not on Windows

    numbers = {name: value for name, value in record.items() if name != "seconds"}
    if rows is not None:
        numbers |= job.score(rows)
    numbers["parameters_total"] = sum(parameter.numel() for parameter in job.model.parameters())
    numbers["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    numbers["total_seconds"] = round(record.get("seconds", 0.0) + time.perf_counter() - started, 1)
    recipe = job.recipe
    report = write_report(folder / "report.json", config=recipe.to_dict(), seed=recipe.seed, **numbers)
    job.describe(folder / CHECKPOINT, report)
    return report


def stage_folders(recipe: Recipe, folder: Path) -> list[Path]:
    """Return the folders of a recipe's stages; a finished one holds `stage.json`."""
    return [folder / "stages" / f"{number}_{stage.name}" for number, stage in enumerate(recipe.stages, start=1)]


def trained_by(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides its weights, as JSON has it."""
    names = ("model", "data", "training", "trainable", "stages", "adapter", "seed")
    return json.loads(json.dumps({name: value for name, value in asdict(recipe).items() if name in names}))


def finished_training(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return the record of a run whose weights are saved; `None` where there is training left.

    Raises:
        ValueError: if another recipe was trained there. Stages say so themselves, one by one.
    """
    path = folder / RECORD_FILE
    if not all(file.is_file() for file in (path, *(own / STAGE_FILE for own in stage_folders(recipe, folder)))):
        return None
    if (damage := weights_damage(folder / CHECKPOINT)) is not None:
        logger.warning("Passing over %s, which is not whole: %s.", folder / CHECKPOINT, damage)
        return None
    try:
        return read_record(path, trained_by(recipe), "training")
    except ValueError:
        if recipe.stages:
            return None
        raise


def run_trainer(trainer: Trainer, folder: Path, resume: bool, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train, and return `train_seconds`, `log_history` and what moved and should not have, or the other way round.

    Args:
        resume: continue from the newest whole checkpoint in `folder`.
        needed: files that each has to hold besides the trainer's own.
    """
    last = newest_whole_checkpoint(folder, needed) if resume else None
    before = fingerprints(trainer.model)
    started = time.perf_counter()
    with _checkpoints_named(folder, needed):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    unmoved, strayed = moved_parameters(trainer.model, before)
    return {
        "unmoved": unmoved,
        "strayed": strayed,
        "train_seconds": round(time.perf_counter() - started, 1),
        "log_history": trainer.state.log_history,
    }


@contextmanager
def _checkpoints_named(folder: Path, needed: tuple[str, ...]) -> Iterator[None]:
    """Say in whatever ends a training from where it can go on."""
    try:
        yield
    except BaseException as error:
        last = newest_whole_checkpoint(folder, needed)
        if last is None:
            error.add_note(
                "No checkpoint has been written yet: the run starts anew. training.save_steps sets how often."
            )
        else:
            error.add_note(f"The same command with --resume continues from {last}.")
        raise


@contextmanager
def weights_named(folder: Path) -> Iterator[None]:
    """Say in whatever fails after the training where its weights are."""
    try:
        yield
    except BaseException as error:
        error.add_note(
            f"The training is finished, and its weights are in {folder / CHECKPOINT}. The same command with --resume "
            "does what is left and does not train again."
        )
        raise


def autocast(model: Any, wanted: dict[str, Any]) -> torch.autocast:
    """Return the precision in which a recipe's `evaluation` scores."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(wanted.get("bf16")))
