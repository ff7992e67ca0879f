"""Runs a recipe: data, model, training, checkpoint, evaluation, report and card."""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import AutoProcessor, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis.drawing import draw_routing
from ..analysis.experts import visual_specialisation
from ..analysis.routing_statistics import RoutingStatistics, active_parameters
from ..configuration.systems import recipe_names
from ..construction.build import build_model
from ..construction.pretrained import host_folder
from ..construction.tokenizer import train_word_tokenizer
from ..data import FeatureCache, VisionLanguageCollator, load_rows
from ..data.chat_template import AnyProcessor
from ..data.row_images import undecoded
from ..data.rows import row_messages
from ..data.text import tokenizer_or_processor
from ..evaluation.vqa import batches, evaluate_vqa, predict_answers
from ..hub.card import write_card
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import host_parts
from .adapter import AdapterJob
from .checks import check_stages
from .job import (
    CHECKPOINT,
    RECORD_FILE,
    Job,
    autocast,
    finish,
    finished_training,
    rehearse,
    save_weights,
    say,
    weights_named,
)  # fmt: skip
from .parts import refuse_strayed, trained_parts
from .processors import as_processor, load_processor
from .recipe import load_recipe
from .sections import Recipe, Stage
from .stages import kept_features, load_trained, run_stages, train_model


def run_recipe(recipe: Recipe, output_dir: str | Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end and return the report, which is also written to `report.json`.

    Leaves `checkpoint/` (a complete checkpoint: config, safetensors, processor, chat template, code, card, picture; or
    an adapter folder, with the tokenizer and a card), `report.json` and the trainer's own files in `output_dir`.

    The end is rehearsed on two rows before the training begins. After it the weights are written first; whatever fails
    then says where they are.

    Args:
        recipe: the job.
        output_dir: `runs/<name>` when absent.
        resume: continue from the newest whole checkpoint in `output_dir`, if there is one; of a job in stages, run
            what is left; where the training is finished, do the rest. Otherwise all starts anew, and the trainer's
            checkpoints of an earlier run go.
    """
    started = time.perf_counter()
    folder = Path(output_dir or Path("runs") / recipe.name)
    set_seed(recipe.seed)
    say("Reading the data")
    job = (ModelJob if recipe.adapter is None else AdapterJob)(recipe, load_sources(recipe), folder)
    record = finished_training(recipe, folder) if resume else None
    if record is None:
        job.build()
        say("Rehearsing the end of the run on two rows")
        rehearse(job)
        (folder / RECORD_FILE).unlink(missing_ok=True)
        if not resume:
            for path in [folder / "stages", *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]:
                shutil.rmtree(path, ignore_errors=True)
        say("Training")
        record = job.train(resume)
        say(f"Writing the weights to {folder / CHECKPOINT}")
        record = save_weights(job, record, started)
        started = time.perf_counter()
    else:
        say(f"The training is finished: opening {folder / CHECKPOINT}")
        job.open(folder / CHECKPOINT)
    with weights_named(folder):
        refuse_strayed(record.get("strayed", []))
        say(f"{'Scoring answers, and writing' if 'eval' in job.rows else 'Writing'} the report and the card")
        return finish(job, record, started, job.rows.get("eval"), folder)


def load_sources(recipe: Recipe) -> dict[str, Any]:
    """Return the rows of a recipe: `train` and, *optional*, `eval`. Errors name the source."""
    rows = {}
    for part, split in {"train": "train", "eval": "test"}.items():
        if recipe.data.get(part) is None:
            continue
        try:
            rows[part] = load_rows(recipe.data[part], split)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"data.{part}: {error}") from error
    return rows


class ModelJob(Job):
    """A recipe that builds a model and trains parts of it, in one go or in stages."""

    features: FeatureCache | None
    statistics: RoutingStatistics

    def build(self) -> None:
        say("Building the model")
        self.model, self.processor = (self._on_host if "host" in self.recipe.model else self._of_parts)()
        check_stages(self.model.config, self.recipe, f"recipe {self.recipe.name}")
        self._read_images()

    def _on_host(self) -> tuple[Any, AnyProcessor]:
        """Return a model of Transformers as a MoE, and its processor."""
        options = dict(self.recipe.model)
        host, template = options.pop("host"), options.pop("chat_template", None)
        processor = AutoProcessor.from_pretrained(host_folder(options.pop("processor", host)))
        if template is not None:
            processor.chat_template = template
        dtype, noise = getattr(torch, options.pop("dtype", "float32")), options.pop("noise_std", 0.0)
        seed = self.recipe.seed
        model = HfMoeForConditionalGeneration.from_host(host, **options, seed=seed, noise=noise, dtype=dtype)
        return model, as_processor(processor)

    def _of_parts(self) -> tuple[Any, AnyProcessor]:
        """Return the model that a decoder and a tower make, and its processor."""
        options = {"vision_tower": None, **self.recipe.model}
        rows = self.rows["train"]
        if options.get("tokenizer") == "words":
            turns = (turn for row in undecoded(rows) for turn in row_messages(row))
            texts = (part["text"] for turn in turns for part in turn["content"] if "text" in part)
            options["tokenizer"] = train_word_tokenizer(texts)
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        model, processor = build_model(**options, seed=self.recipe.seed)
        return model, as_processor(processor)

    def _read_images(self) -> None:
        # Of stages, the last decides what the evaluation sees.
        trainable = self.recipe.stages[-1].trainable if self.recipe.stages else self.recipe.trainable
        trained = trained_parts(trainable)
        self.features = kept_features(self.recipe, self.model, self.processor, self.rows, trained, self.folder)

    def open(self, folder: Path) -> None:
        self.model = load_trained(folder)
        self.processor = load_processor(self.model, str(folder))
        self._read_images()

    def train(self, resume: bool) -> dict[str, Any]:
        recipe = self.recipe
        if not recipe.stages:
            stage = Stage(recipe.name, recipe.trainable)
            return train_model(
                recipe, stage, self.model, self.processor, self.rows["train"], self.features, self.folder, resume
            )
        self.model, records = run_stages(recipe, self.model, self.processor, self.rows, self.folder, resume)
        self._read_images()
        return {
            "stages": records,
            "trainable_parameters": records[-1]["trainable_parameters"],
            "train_seconds": round(sum(item["train_seconds"] for item in records), 1),
            "log_history": records[-1]["log_history"],
        }

    def save_settings(self, folder: Path) -> None:
        # With the config goes the code, which not every mechanism of a user's has.
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        tokenizer_or_processor(self.processor).save_pretrained(folder)

    def score(self, rows: Any) -> dict[str, Any]:
        report, self.statistics = evaluate(self.recipe, self.model, self.processor, rows, self.features)
        return report

    def describe(self, folder: Path, report: dict[str, Any]) -> None:
        pictures = []
        if "routing" in report and self.statistics.tables:
            picture = folder.parent / "routing.png"
            draw_routing(self.statistics, picture, title=f"Routing of {self.recipe.name} on its evaluation data")
            shutil.copyfile(picture, folder / "routing.png")
            pictures.append("routing.png")
        recipe = self.recipe
        write_card(folder, model=self.model, report=report, recipe=recipe.to_dict(), pictures=pictures, **recipe.card)


def evaluate(
    recipe: Recipe, model: Any, processor: AnyProcessor, rows: Any, features: FeatureCache | None
) -> tuple[dict[str, Any], RoutingStatistics]:
    """Score rows, with and without sight, and record what the routers do on them."""
    wanted = recipe.evaluation
    options = {"feature_cache": features, "batch_size": wanted.get("batch_size", 64)}
    with autocast(model, wanted):
        result = evaluate_vqa(model, processor, rows, **options)
        collator = VisionLanguageCollator(processor, feature_cache=features, config=model.config)
        statistics = collect_routing(model, collator, rows)
        report = {
            "accuracy": result["accuracy"],
            "accuracy_by_question_type": result["accuracy_by_question_type"],
            "evaluated": result["count"],
            "parameters_active": active_parameters(model, statistics),
            "routing": statistics.to_dict(),
            "visual_specialisation": {
                str(site): ratios.tolist() for site, ratios in visual_specialisation(statistics).items()
            },
        }
        if wanted.get("blind") and host_parts(model).towers:
            blind = evaluate_vqa(model, processor, rows, zero_images=True, **options)
            report["blind_accuracy"] = blind["accuracy"]
            report["blind_accuracy_by_question_type"] = blind["accuracy_by_question_type"]
        if wanted.get("generated"):
            generated = predict_answers(model, processor, rows.take(wanted["generated"]), generate=True, **options)
            agreeing = sum(map(str.__eq__, result["predictions"], generated))
            report["generation_agrees"] = agreeing / len(generated)
    return report, statistics


@torch.no_grad()
def collect_routing(
    model: Any, collator: VisionLanguageCollator, rows: Any, limit: int = 1024, batch_size: int = 64
) -> RoutingStatistics:
    """Return what the routers do on the first `limit` rows, answers included."""
    statistics = RoutingStatistics()
    with evaluation_mode(model):
        for chosen in batches(rows.take(limit), batch_size):
            batch = {name: value for name, value in collator(chosen).items() if name != "labels"}
            batch = send_to_device(batch, model.device)
            statistics.update(model(**batch, output_routing=True, logits_to_keep=1).routing)
    return statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe train`."""
    parser.add_argument("recipe", help=f"a YAML file, a system that has a recipe, or {', '.join(recipe_names())}")
    parser.add_argument("--output-dir", help="default: runs/<name of the recipe>")
    parser.add_argument(
        "--resume", action="store_true", help="do what is left of the run in the output folder, from its checkpoints"
    )
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
