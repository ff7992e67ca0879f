"""Training in stages: what each one builds, trains and leaves behind.

A stage takes the model of the one before from disk, also in a run that is not interrupted, so that a resumed run is
the same run. Its folder `stages/<number>_<name>` holds the trainer's checkpoints, `model/` and, once it is finished,
`stage.json`; a finished stage is not run again.
"""

import inspect
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from transformers import TrainerCallback

from ..construction.evolution import EVOLUTION_FILE, ExpertEvolution
from ..data import FeatureCache, VisionLanguageCollator, tokenize_rows
from ..data.text import tokenizer_or_processor
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import host_parts, part_of
from .arguments import training_arguments
from .constructions import construct_stage, evolution_of
from .entropy import prediction_entropy
from .job import STAGE_FILE, read_record, run_trainer, say, stage_folders, write_record
from .parts import refuse_strayed, train_only, trained_parts
from .sections import Recipe, Stage
from .trainer import HfMoeTrainer


def run_stages(
    recipe: Recipe, model: Any, processor: Any, rows: dict[str, Any], folder: Path, resume: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """Run a recipe's stages, or those that are left.

    Args:
        rows: `train` and, for their images, `eval`.
        resume: continue within the stage that was stopped; finished ones are not run again, as long as they are there.

    Returns:
        The last stage's model, and the record of every stage.

    Raises:
        ValueError: if a finished stage is not the one that the recipe describes.
        RuntimeError: if a frozen parameter moved.
    """
    records: list[dict[str, Any]] = []
    previous: tuple[Stage, Path] | None = None
    for stage, own in zip(recipe.stages, stage_folders(recipe, folder), strict=True):
        common = {name: getattr(recipe, name) for name in ("model", "data", "training", "seed")}
        job = json.loads(json.dumps({"stage": asdict(stage), **common}))
        if (own / STAGE_FILE).is_file():
            record = read_record(own / STAGE_FILE, job, "stage")
        else:
            say(f"Stage {stage.name}")
            if previous is not None:
                model = load_trained(previous[1])
            model = construct(model, stage, previous, recipe.seed)
            evolution = evolution_of(stage, model, recipe.seed)
            features = kept_features(recipe, model, processor, rows, trained_parts(stage.trainable), folder)
            record = train_model(recipe, stage, model, processor, rows["train"], features, own, resume, evolution)
            model.save_pretrained(own / "model")
            if evolution is not None:
                evolution.save(own / "model")
            record = {"name": stage.name, **record}
            write_record(own / STAGE_FILE, job, record)
            model = None
        refuse_strayed(record.get("strayed", []))
        records.append(record)
        previous = stage, own / "model"
    return load_trained(own / "model"), records


def load_trained(folder: Path) -> HfMoeForConditionalGeneration:
    """Return a model as it was saved, in its precision."""
    return HfMoeForConditionalGeneration.from_pretrained(folder, dtype="auto")


def construct(model: Any, stage: Stage, previous: tuple[Stage, Path] | None, seed: int) -> Any:
    """Return the model that a stage trains, made from that of the stage and folder before; see [`construct_stage`]."""
    evolution = None
    if previous is not None and "assemble" in (stage.construct or {}):
        evolution = evolution_of(previous[0], model, seed)
        if evolution is not None:
            evolution.load(previous[1])
    return construct_stage(model, stage, evolution, seed)


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
    """Train a model as a stage says, and return `trainable_parameters` by part and what [`run_trainer`] does."""
    first = set() if evolution is None else evolution.first_names(model)
    trainable = train_only(model, stage.trainable, first)
    callbacks: list[TrainerCallback] = [] if evolution is None else [evolution]
    trainer = HfMoeTrainer(
        model=model,
        args=training_arguments({**recipe.training, **stage.training}, recipe.seed, folder),
        train_dataset=tokenize_rows(rows, processor),
        data_collator=VisionLanguageCollator(processor, recipe.data.get("max_length"), features, config=model.config),
        processing_class=tokenizer_or_processor(processor),
        callbacks=callbacks,
        learning_rate_scales=stage.learning_rate_scales,
        compute_loss_func=prediction_entropy if stage.loss == "entropy" else None,
    )
    needed = () if evolution is None else (EVOLUTION_FILE,)
    return {"trainable_parameters": trainable, **run_trainer(trainer, folder, resume, needed)}


def kept_features(
    recipe: Recipe, model: Any, processor: Any, rows: dict[str, Any], trained: Collection[str], folder: Path
) -> FeatureCache | None:
    """Return the features of all images of a run, and of all videos where the host takes them.

    Of a host of Transformers they are what its connector returns, of a model that is put together what its tower does.

    Returns:
        `None` where the recipe keeps none, without a tower, where what the features come from is trained, and of hosts
        that take pixels alone.
    """
    if not recipe.data.get("keep_features", True):
        return None
    parts, base = host_parts(model), model.base_model
    hosted = model.config.host_type is not None
    encoders = (*parts.towers, *parts.connectors) if hosted else parts.towers
    encoding = {"tower", "connector"} if hosted else {"tower"}
    if any(parts.holder(path) in encoders for path in parts.moe_layers):
        encoding |= {"experts", "routers"}
    if not parts.towers or not encoding.isdisjoint(trained):
        return None
    if hosted and "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        return None
    for name, parameter in model.named_parameters():
        if parts.holder(name) in encoders or (hosted and part_of(name, parts) == "connector"):
            parameter.requires_grad_(False)
    media = ("images", "videos") if hosted else ("images",)
    seen = [(part, [name for name in media if name in part.column_names]) for part in rows.values()]
    pictured = [part.select_columns(names) for part, names in seen if names]
    if hosted and not pictured:
        return None
    images = concatenate_datasets(pictured) if pictured else []
    return FeatureCache.build(model, processor, images, cache_dir=folder / "features")
