"""The `TrainingArguments` of a recipe: checked as it is read, made when it trains."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..configuration.checks import Interval, unknown_name_message
from .schema import fit, refuse_words


# What a recipe, or the command, says elsewhere.
ELSEWHERE = {
    "output_dir": "give the folder as --output-dir",
    "seed": "a recipe has one seed, its own field",
    "resume_from_checkpoint": "pass --resume",
}
# A trainer would say so only as the stage begins, after hours of those before it.
NEVER = ("load_best_model_at_end", "eval_strategy", "eval_on_start")
# Where Trainer itself takes every number, and what it does with a wrong one shows late or never.
RANGES = {
    "learning_rate": Interval(0),
    "weight_decay": Interval(0),
    "max_grad_norm": Interval(0),
    "label_smoothing_factor": Interval(0, 1),
    "num_train_epochs": Interval(0, open_minimum=True),
    "max_steps": Interval(-1),
    "per_device_train_batch_size": Interval(1),
    "gradient_accumulation_steps": Interval(1),
    "warmup_steps": Interval(0),
    "logging_steps": Interval(0, open_minimum=True),
    "save_steps": Interval(0, open_minimum=True),
    "save_total_limit": Interval(1),
    "dataloader_num_workers": Interval(0),
}


def check_training(options: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a recipe's `training` with every value as `TrainingArguments` declares it; errors name the `place`.

    Raises:
        ValueError: if a field is unknown, is not for recipes, or has a value that it does not take.
    """
    kinds = get_type_hints(TrainingArguments)
    known = [item.name for item in fields(TrainingArguments) if item.init and item.name not in ELSEWHERE]
    fitted = {}
    for name, value in options.items():
        key = f"training.{name}"
        if name in ELSEWHERE:
            raise ValueError(f"The {place} sets {key}={value!r}: {ELSEWHERE[name]}.")
        if name not in known:
            raise ValueError(unknown_name_message(f"field of training in the {place}", str(name), known))
        fitted[name] = fit(value, kinds[name], place, key)
        if isinstance(value, dict):
            refuse_words(value, place, key)
        if name in RANGES and fitted[name] is not None and fitted[name] not in RANGES[name]:
            raise ValueError(f"The {place}: {key}={value!r} must {RANGES[name]}.")
        if name in NEVER and fitted[name] not in (False, "no"):
            raise ValueError(
                f"The {place} sets {key}={value!r}: a recipe evaluates once, after its training. "
                "Remove it, or train with HfMoeTrainer and an eval_dataset."
            )
        if name == "remove_unused_columns" and fitted[name]:
            raise ValueError(f"The {place} sets {key}=True: the collator of a recipe reads all columns. Remove it.")
    if fitted.get("max_steps") == 0:
        raise ValueError(f"The {place} has training.max_steps=0, which trains nothing: give a number of at least 1.")
    return fitted


def check_arguments(options: dict[str, Any], seed: int, place: str) -> None:
    """Make the arguments, the optimizer and the schedule of a training or of a stage once, for what only they check.

    Raises:
        ValueError: if they refuse the options.
    """
    try:
        arguments = training_arguments(options, seed, Path("runs"))
        get_reporting_integration_callbacks(arguments.report_to)
        if arguments.optim_target_modules is None:
            optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **settings)
            get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 10, arguments.lr_scheduler_kwargs)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"The training of the {place} is refused. {type(error).__name__}: {error}") from error


def training_arguments(options: dict[str, Any], seed: int, folder: Path) -> TrainingArguments:
    """Return the `TrainingArguments` of a recipe's options; without an accelerator they run on the CPU."""
    defaults = {"report_to": "none", "remove_unused_columns": False, "use_cpu": not torch.cuda.is_available()}
    return TrainingArguments(output_dir=str(folder), seed=seed, **{**defaults, **options})
