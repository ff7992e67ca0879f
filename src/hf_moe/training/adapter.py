"""Runs a recipe that trains an adapter: a frozen base, LoRA experts on it, an adapter folder.

The base is a decoder of text, or a checkpoint of this library, which may see.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedConfig, Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..adapters import LogRouting
from ..adapters.conditions import conditions_read
from ..adapters.index import index_of
from ..configuration.configuration_hf_moe import HfMoeConfig
from ..construction.pretrained import PACKAGED, load_language_model
from ..construction.tokenizer import default_chat_template
from ..data import FeatureCache, TextProcessor, VisionLanguageCollator, tokenize_rows
from ..data.chat_template import AnyProcessor
from ..evaluation.report import write_report
from ..evaluation.vqa import evaluate_vqa
from ..hub.adapter_card import write_adapter_card
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.processing_hf_moe import HfMoeProcessor
from .parts import check_moved, fingerprints
from .recipe import Recipe, adapter_config
from .stages import image_features, training_arguments


def run_adapter_recipe(recipe: Recipe, rows: dict[str, Any], folder: Path, resume: bool = False) -> dict[str, Any]:
    """Train an adapter and return the report; see [`run_recipe`].

    Args:
        recipe: the job, with an `adapter`.
        rows: `train` and, *optional*, `eval`.
        folder: of the run.
        resume: continue from the last trainer checkpoint in `folder`, if there is one.

    Raises:
        ValueError: if the rows lack what a router reads, or what the base cannot read is in them.
        RuntimeError: if a parameter of the base moved.
    """
    started = time.perf_counter()
    base, processor = load_base(recipe.model)
    model = get_peft_model(base, adapter_config(recipe.adapter or {}))
    conditions = sorted(conditions_read(index_of(model).routers()))
    for part, part_rows in rows.items():
        for name in conditions:
            if f"{name}_ids" not in (part_rows.column_names or ()):
                raise ValueError(
                    f"The router reads the condition {name!r}, and the rows of data.{part} have no column {name}_ids; "
                    f"they have {', '.join(part_rows.column_names or ())}."
                )
    features = _features(base, model, processor, rows, folder)
    report: dict[str, Any] = {"trainable_parameters": trainable_parameters(model)}
    report |= _train(recipe, model, processor, rows["train"], features, conditions, folder, resume)
    if "eval" in rows:
        options = {"feature_cache": features, "batch_size": recipe.evaluation.get("batch_size", 64)}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(recipe.evaluation.get("bf16"))):
            result = evaluate_vqa(model, processor, rows["eval"], conditions=conditions, **options)
            with model.disable_adapter():
                untouched = evaluate_vqa(model, processor, rows["eval"], **options)
        for prefix, scored in (("", result), ("base_", untouched)):
            for name in ("accuracy", "accuracy_by_question_type"):
                report[prefix + name] = scored[name]
        report["evaluated"] = result["count"]
    report |= {
        "parameters_total": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    report = write_report(folder / "report.json", config=recipe.to_dict(), seed=recipe.seed, **report)
    target = folder / "checkpoint"
    model.save_pretrained(target)
    tokenizer_or_processor(processor).save_pretrained(target)
    write_adapter_card(target, model=model, report=report, recipe=recipe.to_dict(), **recipe.card)
    return report


def load_base(options: dict[str, Any]) -> tuple[Any, AnyProcessor]:
    """Load what a recipe's `model` names, and its processor.

    Raises:
        ValueError: if it is neither a decoder of text nor a checkpoint of this library.
    """
    source, revision = options["base"], options.get("revision")
    dtype = getattr(torch, options.get("dtype", "float32"))
    if source not in PACKAGED and not source.endswith(".gguf"):
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if config.get("model_type") == HfMoeConfig.model_type:
            base = HfMoeForConditionalGeneration.from_pretrained(source, dtype=dtype, revision=revision)
            if base.config.vision_config is not None:
                return base, HfMoeProcessor.from_pretrained(source, revision=revision)
            return base, TextProcessor(AutoTokenizer.from_pretrained(source, revision=revision))
        if "vision_config" in config:
            raise ValueError(
                f"model.base={source!r} is a {config.get('model_type')!r} model that sees: a recipe adapts decoders "
                "of text and checkpoints of this library; give others to get_peft_model and Trainer."
            )
    base, tokenizer = load_language_model(source, dtype, revision)
    # What the adapter's config records: a packaged model has no folder that another machine would know.
    base.name_or_path = source
    if tokenizer.chat_template is None:
        tokenizer.chat_template = default_chat_template(tokenizer, image_token=None)
    return base, TextProcessor(tokenizer)


def tokenizer_or_processor(processor: AnyProcessor) -> Any:
    """Return what Transformers would give as the model's processor."""
    return processor.tokenizer if isinstance(processor, TextProcessor) else processor


def trainable_parameters(model: PeftModel) -> dict[str, int]:
    """Return the number of trainable parameters, of `experts` and `routers`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "routers" if "moe_lora_router" in name else "experts"
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _features(
    base: Any, model: PeftModel, processor: AnyProcessor, rows: dict[str, Any], folder: Path
) -> FeatureCache | None:
    """Return the features of all images; `None` without a tower, or where the adapter changes the tower."""
    if not isinstance(base, HfMoeForConditionalGeneration):
        return None
    adapted = any("vision_tower" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return None if adapted else image_features(base, processor, rows, [], folder)


def _train(
    recipe: Recipe,
    model: PeftModel,
    processor: AnyProcessor,
    rows: Any,
    features: FeatureCache | None,
    conditions: list[str],
    folder: Path,
    resume: bool,
) -> dict[str, Any]:
    before = fingerprints(model)
    collator = VisionLanguageCollator(processor, recipe.data.get("max_length"), features, conditions=conditions)
    trainer = Trainer(
        model=model,
        args=training_arguments(recipe, {}, folder),
        train_dataset=tokenize_rows(rows, processor),
        data_collator=collator,
        processing_class=tokenizer_or_processor(processor),
        callbacks=[LogRouting()],
    )
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    return {
        "unmoved": check_moved(model, before),
        "train_seconds": round(time.perf_counter() - started, 1),
        "log_history": trainer.state.log_history,
    }
