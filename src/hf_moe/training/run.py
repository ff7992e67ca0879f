"""Runs a recipe: data, model, training, evaluation, checkpoint, card and report."""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..analysis.pictures import draw_routing
from ..analysis.routing_statistics import RoutingStatistics, active_parameters
from ..construction.build import build_model
from ..construction.tokenizer import train_word_tokenizer
from ..data import FeatureCache, VisionLanguageCollator, load_rows, tokenize_rows
from ..evaluation.report import write_report
from ..evaluation.vqa import evaluate_vqa, predict_answers
from ..hub.card import write_card
from .parts import train_only
from .recipe import Recipe, load_recipe, recipe_names
from .trainer import HfMoeTrainer


def run_recipe(recipe: Recipe, output_dir: str | Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end and return the report, which is also written to `report.json`.

    Leaves `checkpoint/` (a complete checkpoint: config, safetensors, processor, chat template, code, card, picture),
    `report.json` and the trainer's own files in `output_dir`.

    Args:
        recipe: the job.
        output_dir: `runs/<name>` when absent.
        resume: continue from the last trainer checkpoint in `output_dir`, if there is one.
    """
    started = time.perf_counter()
    folder = Path(output_dir or Path("runs") / recipe.name)
    set_seed(recipe.seed)
    splits = {"train": "train", "eval": "test"}
    rows = {part: load_rows(recipe.data[part], split) for part, split in splits.items() if part in recipe.data}
    model, processor = _build(recipe, rows["train"])
    trainable = train_only(model, recipe.trainable)
    features = None
    if model.model.vision_tower is not None and "vision_tower" not in trainable:
        images = concatenate_datasets([part.select_columns(["images", "image_id"]) for part in rows.values()])
        features = FeatureCache.build(model, processor, images, cache_dir=folder / "features")

    trainer = HfMoeTrainer(
        model=model,
        args=training_arguments(recipe, folder),
        train_dataset=tokenize_rows(rows["train"], processor),
        data_collator=VisionLanguageCollator(processor, recipe.data.get("max_length"), features),
        processing_class=processor,
    )
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    train_started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    train_seconds = time.perf_counter() - train_started

    report: dict[str, Any] = {"trainable_parameters": trainable}
    if "eval" in rows:
        report |= evaluate(recipe, model, processor, rows["eval"], features, folder)
    report |= {
        "train_seconds": round(train_seconds, 1),
        "parameters_total": sum(parameter.numel() for parameter in model.parameters()),
        "log_history": trainer.state.log_history,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    report = write_report(folder / "report.json", config=recipe.to_dict(), seed=recipe.seed, **report)
    save_checkpoint(recipe, model, processor, report, folder)
    return report


def _build(recipe: Recipe, rows: Any) -> tuple[Any, Any]:
    options = dict(recipe.model)
    if options.get("tokenizer") == "words":
        texts = (part["text"] for row in rows["messages"] for turn in row for part in turn["content"] if part["text"])
        options["tokenizer"] = train_word_tokenizer(texts)
    return build_model(**options, seed=recipe.seed)


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """Return the recipe's `TrainingArguments`; on a machine without an accelerator they run on the CPU."""
    options = {"report_to": "none", "remove_unused_columns": False, "use_cpu": not torch.cuda.is_available()}
    return TrainingArguments(output_dir=str(folder), seed=recipe.seed, **{**options, **recipe.training})


def evaluate(
    recipe: Recipe, model: Any, processor: Any, rows: Any, features: FeatureCache | None, folder: Path
) -> dict[str, Any]:
    """Score the evaluation rows, with and without sight, and record what the routers do on them."""
    wanted = recipe.evaluation
    options = {"feature_cache": features, "batch_size": wanted.get("batch_size", 64)}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(wanted.get("bf16"))):
        result = evaluate_vqa(model, processor, rows, **options)
        statistics = collect_routing(model, VisionLanguageCollator(processor, feature_cache=features), rows)
        report = {
            "accuracy": result["accuracy"],
            "accuracy_by_question_type": result["accuracy_by_question_type"],
            "evaluated": result["count"],
            "parameters_active": active_parameters(model, statistics),
            "routing": statistics.to_dict(),
        }
        if wanted.get("blind"):
            blind = evaluate_vqa(model, processor, rows, zero_images=True, **options)
            report["blind_accuracy"] = blind["accuracy"]
            report["blind_accuracy_by_question_type"] = blind["accuracy_by_question_type"]
        if wanted.get("generated"):
            sample = rows.select(range(min(wanted["generated"], len(rows))))
            generated = predict_answers(model, processor, sample, generate=True, **options)
            report["generation_agrees"] = sum(map(str.__eq__, result["predictions"], generated)) / len(sample)
    draw_routing(statistics, folder / "routing.png", title=f"Routing of {recipe.name} on its evaluation data")
    return report


@torch.no_grad()
def collect_routing(
    model: Any, collator: VisionLanguageCollator, rows: Any, limit: int = 1024, batch_size: int = 64
) -> RoutingStatistics:
    """Return what the routers do on the first `limit` rows, answers included."""
    statistics = RoutingStatistics()
    model.eval()
    for start in range(0, min(limit, len(rows)), batch_size):
        chosen = rows.select(range(start, min(start + batch_size, limit, len(rows))))
        batch = {name: tensor.to(model.device) for name, tensor in collator(list(chosen)).items() if name != "labels"}
        statistics.update(model(**batch, output_routing=True, logits_to_keep=1).routing)
    return statistics


def save_checkpoint(recipe: Recipe, model: Any, processor: Any, report: dict[str, Any], folder: Path) -> None:
    """Write the checkpoint folder: model, processor, code, card and picture."""
    target = folder / "checkpoint"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    pictures = []
    if (folder / "routing.png").is_file():
        (target / "routing.png").write_bytes((folder / "routing.png").read_bytes())
        pictures.append("routing.png")
    write_card(target, model=model, report=report, recipe=recipe.to_dict(), pictures=pictures, **recipe.card)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe train`."""
    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--output-dir", help="default: runs/<name of the recipe>")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="training.max_steps=10"
    )


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe train`."""
    report = run_recipe(load_recipe(args.recipe, args.overrides), args.output_dir, args.resume)
    shown = ("accuracy", "blind_accuracy", "accuracy_by_question_type", "train_seconds", "total_seconds")
    print(json.dumps({key: report[key] for key in shown if key in report}, indent=2))
    return 0
