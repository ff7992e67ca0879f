"""Training in stages: what each one builds, trains and leaves behind.

A stage takes the model of the one before from disk, also in a run that is not interrupted, so that a resumed run is
the same run. Its folder `stages/<number>_<name>` holds the trainer's checkpoints, `model/` and, once it is finished,
`stage.json`; a finished stage is not run again.
"""

import json
import shutil
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..configuration import HfMoeConfig, MoeConfig
from ..configuration.configuration_hf_moe import unknown_name_message
from ..configuration.systems import load_preset
from ..construction.conversion import convert_router, set_objectives
from ..construction.evolution import ExpertEvolution, assemble
from ..data import FeatureCache, VisionLanguageCollator, tokenize_rows
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from .parts import check_moved, fingerprints, train_only
from .recipe import Recipe, Stage
from .trainer import HfMoeTrainer


STAGE_FILE = "stage.json"
CONSTRUCTIONS = ("upcycle", "assemble", "convert_router")


def run_stages(
    recipe: Recipe, model: Any, processor: Any, rows: dict[str, Any], folder: Path, resume: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """Run a recipe's stages, or those that are left.

    Args:
        model: what the first stage starts from.
        rows: `train` and, for their images, `eval`.
        folder: of the run.
        resume: skip finished stages and continue within the next; otherwise all start anew, and what is in their
            folders goes.

    Returns:
        The last stage's model, and the record of every stage.

    Raises:
        ValueError: if a finished stage is not the one that the recipe describes.
        RuntimeError: if a frozen parameter moved.
    """
    if not resume:
        shutil.rmtree(folder / "stages", ignore_errors=True)
    records: list[dict[str, Any]] = []
    previous: tuple[Stage, Path] | None = None
    for number, stage in enumerate(recipe.stages, start=1):
        own = folder / "stages" / f"{number}_{stage.name}"
        record = _finished(own, recipe, stage)
        if record is None:
            if previous is not None:
                model = _load(previous[1])
            model = construct(model, stage, previous, recipe.seed)
            record = _run_stage(recipe, stage, model, processor, rows, folder, own)
            model = None
        records.append(record)
        previous = stage, own / "model"
    return _load(own / "model"), records


def _load(folder: Path) -> HfMoeForConditionalGeneration:
    return HfMoeForConditionalGeneration.from_pretrained(folder, dtype="auto")


def _run_stage(
    recipe: Recipe, stage: Stage, model: Any, processor: Any, rows: dict[str, Any], run_folder: Path, folder: Path
) -> dict[str, Any]:
    evolution = _evolution(stage, model, recipe.seed)
    features = image_features(model, processor, rows, stage.trainable, run_folder)
    record = train_model(recipe, stage, model, processor, rows["train"], features, folder, True, evolution)
    model.save_pretrained(folder / "model")
    if evolution is not None:
        evolution.save(folder / "model")
    record = {"name": stage.name, **record}
    partial = folder / f"{STAGE_FILE}.partial"
    partial.write_text(json.dumps({"job": _job(recipe, stage), "record": record}), encoding="utf-8")
    partial.replace(folder / STAGE_FILE)
    return record


def _job(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    common = {name: getattr(recipe, name) for name in ("model", "data", "training", "seed")}
    return json.loads(json.dumps({"stage": asdict(stage), **common}))


def _finished(folder: Path, recipe: Recipe, stage: Stage) -> dict[str, Any] | None:
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name, value in _job(recipe, stage).items() if content["job"][name] != value]
    if changed:
        raise ValueError(
            f"The finished stage in {folder} was another: its {' and '.join(changed)} differ from the recipe's. "
            "Restore the recipe, or start over without resuming."
        )
    return content["record"]


def _evolution(stage: Stage, model: Any, seed: int) -> ExpertEvolution | None:
    if stage.evolve is None:
        return None
    options = {"seed": seed, **stage.evolve}
    layers = MoeConfig(layers=options.pop("layers")).moe_layers(model.config.text_config.num_hidden_layers)
    return ExpertEvolution(layers, **options)


def construct(model: Any, stage: Stage, previous: tuple[Stage, Path] | None, seed: int) -> Any:
    """Return the model that a stage trains, made from `model`, the one before.

    `upcycle` and `assemble` take `system` (a preset) and `moe_config` (fields over it), and `upcycle` the `noise_std`
    of [`assemble`]; `convert_router` takes the arguments of [`convert_router`].

    Args:
        previous: the stage before, and the folder of its model.

    Raises:
        ValueError: if there is no such construction, or no experts evolved that `assemble` could take.
    """
    for method, given in (stage.construct or {}).items():
        options = deepcopy(given)
        if method == "convert_router":
            convert_router(model, **{"seed": seed, **options})
        elif method in CONSTRUCTIONS:
            system, fields = options.pop("system", None), options.pop("moe_config", {})
            base = load_preset(system)["moe_config"] if system else {}
            config = {**model.config.to_dict(), "moe_config": {**base, **fields}, "system": system}
            evolution = _evolved(model, previous, seed) if method == "assemble" else None
            model = assemble(model, HfMoeConfig.from_dict(config), evolution, **{"seed": seed, **options})
        else:
            raise ValueError(unknown_name_message("construction", method, list(CONSTRUCTIONS)))
    if stage.objectives is not None:
        set_objectives(model, stage.objectives)
    return model


def _evolved(model: Any, previous: tuple[Stage, Path] | None, seed: int) -> ExpertEvolution:
    evolution = None if previous is None else _evolution(previous[0], model, seed)
    if previous is None or evolution is None:
        raise ValueError(
            "The construction 'assemble' takes the experts that evolved in the stage before: give that stage "
            "'evolve', or use 'upcycle' for copies."
        )
    evolution.load(previous[1])
    return evolution


def train_model(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    processor: Any,
    rows: Any,
    features: FeatureCache | None,
    folder: Path,
    resume: bool,
    evolution: ExpertEvolution | None = None,
) -> dict[str, Any]:
    """Train a model as a stage says, and check what moved.

    Args:
        rows: of the training.
        features: of their images, where the tower is not trained.
        folder: for the trainer's checkpoints.
        resume: continue from the last of them, if there is one.
        evolution: experts that evolve beside the training.

    Returns:
        `trainable_parameters` by part, `unmoved` trainable parameters, `train_seconds` and `log_history`.

    Raises:
        RuntimeError: if a frozen parameter moved.
    """
    first = set()
    if evolution is not None:
        watched = {id(parameter) for parameter in evolution.first_expert(model).values()}
        first = {name for name, parameter in model.named_parameters() if id(parameter) in watched}
    trainable = train_only(model, stage.trainable, first)
    before = fingerprints(model)
    callbacks: list[TrainerCallback] = [] if evolution is None else [evolution]
    trainer = HfMoeTrainer(
        model=model,
        args=training_arguments(recipe, stage.training, folder),
        train_dataset=tokenize_rows(rows, processor),
        data_collator=VisionLanguageCollator(processor, recipe.data.get("max_length"), features),
        processing_class=processor,
        callbacks=callbacks,
        learning_rate_scales=stage.learning_rate_scales,
    )
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    return {
        "trainable_parameters": trainable,
        "unmoved": check_moved(model, before),
        "train_seconds": round(time.perf_counter() - started, 1),
        "log_history": trainer.state.log_history,
    }


def image_features(
    model: Any, processor: Any, rows: dict[str, Any], trainable: list[str], folder: Path
) -> FeatureCache | None:
    """Return the features of all images of a run; `None` without a tower, or where the tower is trained."""
    tower = model.model.vision_tower
    if tower is None or any(selector.partition("/")[0] == "vision_tower" for selector in trainable):
        return None
    tower.requires_grad_(False)
    parts = [part for part in rows.values() if "images" in part.column_names]
    images = concatenate_datasets([part.select_columns(["images"]) for part in parts]) if parts else []
    return FeatureCache.build(model, processor, images, cache_dir=folder / "features")


def training_arguments(recipe: Recipe, overrides: dict[str, Any], folder: Path) -> TrainingArguments:
    """Return a recipe's `TrainingArguments` with a stage's; without an accelerator they run on the CPU."""
    options = {"report_to": "none", "remove_unused_columns": False, "use_cpu": not torch.cuda.is_available()}
    return TrainingArguments(output_dir=str(folder), seed=recipe.seed, **{**options, **recipe.training, **overrides})
