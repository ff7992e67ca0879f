"""One run of a comparison: a contestant trains from the shared start and is scored, and what it sees is watched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..analysis.experts import mean_loss
from ..analysis.routing_statistics import RoutingStatistics
from ..configuration.configuration_hf_moe import MODALITIES
from ..data import VisionLanguageCollator
from ..evaluation.vqa import batches
from ..modeling.parts import host_parts, part_of
from .job import autocast
from .parts import refuse_strayed
from .run import ModelJob, evaluate
from .sections import Recipe


# Rows on which the active parameters at the start are counted.
COUNTED_ROWS = 256
# Steps whose time is not counted: the first ones allocate.
WARM_UP_STEPS = 2


def build(recipe: Recipe, rows: dict[str, Any], folder: Path) -> ModelJob:
    """Return the job of a contestant with its model, as `hf-moe train` begins it."""
    set_seed(recipe.seed)
    job = ModelJob(recipe, rows, folder)
    job.build()
    return job


def mean_active(active: dict[str, int], statistics: RoutingStatistics) -> float:
    """Return the active parameters of a mean token, of whatever modality."""
    tokens = statistics.seen.tolist()
    weighted = sum(active[name] * count for name, count in zip(MODALITIES, tokens, strict=True) if count)
    return weighted / sum(tokens)


def entropies(statistics: RoutingStatistics) -> dict[str, float]:
    """Return, by modality, the entropy of the expert shares over log E, 0 to 1, as a mean over the layers."""
    found = {}
    for row, name in enumerate(MODALITIES):
        values = [statistics.entropy(site)[row].item() for site, n in statistics.tokens.items() if n[row] > 0]
        if values:
            found[name] = sum(values) / len(values)
    return found


def experts_per_token(model: Any, statistics: RoutingStatistics) -> dict[str, float]:
    """Return, by modality, how many experts work on a mean token of a layer, in all of its rounds together."""
    layers = model.moe_layers().values()
    sites = [router.spec.site for layer in layers for router in layer.routers]
    found = {}
    for row, name in enumerate(MODALITIES):
        values = [statistics.active_experts(site)[row].item() for site in sites if statistics.tokens[site][row] > 0]
        if values:
            found[name] = sum(values) / len(layers)
    return found


def initial_state(recipe: Recipe, rows: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters from which all contestants of a seed start, see [`take_start`]."""
    return {name: value.detach().clone() for name, value in build(recipe, rows, folder).model.named_parameters()}


@torch.no_grad()
def take_start(model: Any, start: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """Give a model the values that it shares with the first system, and return how many parameters of each part do.

    Returns:
        part, of [`PARTS`], -> `equal` and `own`, numbers of parameters.
    """
    parts = host_parts(model)
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part, known = part_of(name, parts), start.get(name)
        equal = part != "routers" and known is not None and known.shape == parameter.shape
        if equal:
            parameter.copy_(known)
        counts.setdefault(part, {"equal": 0, "own": 0})["equal" if equal else "own"] += parameter.numel()
    return counts


class Watch:
    """Watches a training through the forward passes of its model: what it sees, and the time of the process.

    Attributes:
        digest: of all token ids, in order.
        times: CPU seconds of the process, all its threads, when each forward pass began.
    """

    def __init__(self, progress: Any, batches_per_step: int):
        self.digest = blake2b(digest_size=16)
        self.times: list[float] = []
        self.progress = progress
        self.batches_per_step = batches_per_step

    @contextmanager
    def of(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch a model for the duration of the context."""
        hook = model.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, model: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        self.times.append(time.process_time())
        self.digest.update(inputs["input_ids"].cpu().numpy().tobytes())
        if len(self.times) % self.batches_per_step == 0:
            self.progress.update(1)

    def step_seconds(self) -> float | None:
        """Return the median CPU seconds from step to step; `None` of a training that is too short."""
        starts = self.times[:: self.batches_per_step][WARM_UP_STEPS:]
        steps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
        return float(torch.tensor(steps).median()) if steps else None


def train_contestant(
    recipe: Recipe, rows: dict[str, Any], folder: Path, start: dict[str, torch.Tensor], progress: Any
) -> dict[str, Any]:
    """Train a recipe from a given start, score it, and return what is kept of the run."""
    job = build(recipe, rows, folder)
    shared = take_start(job.model, start)
    watch = Watch(progress, recipe.training.get("gradient_accumulation_steps", 1))
    with watch.of(job.model):
        record = job.train(resume=False)
    refuse_strayed(record["strayed"])
    report, statistics = evaluate(recipe, job.model, job.processor, rows["eval"], job.features)
    collator = VisionLanguageCollator(job.processor, feature_cache=job.features, config=job.model.config)
    with autocast(job.model, recipe.evaluation):
        loss = mean_loss(job.model, map(collator, batches(rows["eval"], recipe.evaluation.get("batch_size", 64))))
    active = report["parameters_active"]
    return {
        **kept_of(report, record, watch, statistics),
        "loss": loss,
        "active": active,
        "mean_active": mean_active(active, statistics),
        "experts_per_token": experts_per_token(job.model, statistics),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "start": shared,
    }


def kept_of(
    report: dict[str, Any], record: dict[str, Any], watch: Watch, statistics: RoutingStatistics
) -> dict[str, Any]:
    """Return what is kept of every run, whatever was trained."""
    return {
        **{name: report[name] for name in ("accuracy", "accuracy_by_question_type", "evaluated")},
        "entropy": entropies(statistics),
        "step_cpu_seconds": watch.step_seconds(),
        "train_seconds": record["train_seconds"],
        "train_loss": [round(float(entry["loss"]), 4) for entry in record["log_history"] if "loss" in entry],
        "data_order": watch.digest.hexdigest(),
    }
