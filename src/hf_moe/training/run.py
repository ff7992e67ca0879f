"""Runs a recipe: data, model, training, evaluation, checkpoint, card and report."""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..analysis.pictures import draw_routing
from ..analysis.routing_statistics import RoutingStatistics, active_parameters
from ..construction.build import build_model
from ..construction.tokenizer import train_word_tokenizer
from ..data import FeatureCache, VisionLanguageCollator, load_rows
from ..data.pictures import undecoded
from ..data.rows import row_messages
from ..evaluation.report import write_report
from ..evaluation.vqa import evaluate_vqa, predict_answers
from ..hub.card import write_card
from .adapter import run_adapter_recipe
from .recipe import Recipe, Stage, load_recipe, recipe_names
from .stages import image_features, run_stages, train_model


def run_recipe(recipe: Recipe, output_dir: str | Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end and return the report, which is also written to `report.json`.

    Leaves `checkpoint/` (a complete checkpoint: config, safetensors, processor, chat template, code, card, picture; or
    an adapter folder, with the tokenizer and a card), `report.json` and the trainer's own files in `output_dir`.

    Args:
        recipe: the job.
        output_dir: `runs/<name>` when absent.
        resume: continue from the last trainer checkpoint in `output_dir`, if there is one; of a job in stages, run
            what is left.
    """
    started = time.perf_counter()
    folder = Path(output_dir or Path("runs") / recipe.name)
    set_seed(recipe.seed)
    splits = {"train": "train", "eval": "test"}
    rows = {part: load_rows(recipe.data[part], split) for part, split in splits.items() if part in recipe.data}
    if recipe.adapter is not None:
        return run_adapter_recipe(recipe, rows, folder, resume)
    model, processor = _build(recipe, rows["train"])
    report: dict[str, Any] = {}
    if recipe.stages:
        model, report["stages"] = run_stages(recipe, model, processor, rows, folder, resume)
        trained = report["stages"][-1]
        features = image_features(model, processor, rows, [], folder)
    else:
        stage = Stage(recipe.name, recipe.trainable)
        features = image_features(model, processor, rows, recipe.trainable, folder)
        trained = train_model(recipe, stage, model, processor, rows["train"], features, folder, resume)
    report["trainable_parameters"] = trained["trainable_parameters"]
    if "eval" in rows:
        report |= evaluate(recipe, model, processor, rows["eval"], features, folder)
    report |= {
        "train_seconds": round(sum(item["train_seconds"] for item in report.get("stages", [trained])), 1),
        "parameters_total": sum(parameter.numel() for parameter in model.parameters()),
        "log_history": trained["log_history"],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    report = write_report(folder / "report.json", config=recipe.to_dict(), seed=recipe.seed, **report)
    save_checkpoint(recipe, model, processor, report, folder)
    return report


def _build(recipe: Recipe, rows: Any) -> tuple[Any, Any]:
    options = dict(recipe.model)
    if options.get("tokenizer") == "words":
        turns = (turn for row in undecoded(rows) for turn in row_messages(row))
        texts = (part["text"] for turn in turns for part in turn["content"] if "text" in part)
        options["tokenizer"] = train_word_tokenizer(texts)
    return build_model(**options, seed=recipe.seed)


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
    if statistics.tables:
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
    accuracies = ("accuracy", "blind_accuracy", "base_accuracy", "accuracy_by_question_type")
    shown = [key for key in (*accuracies, "train_seconds", "total_seconds") if key in report]
    print(json.dumps({key: report[key] for key in shown}, indent=2))
    return 0
