"""Runs a recipe that trains an adapter: a frozen base, LoRA experts on it, an adapter folder.

The base is a decoder of text, or a checkpoint of this library, which may see.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedConfig, Trainer

from ..adapters.index import index_of
from ..configuration.configuration_hf_moe import HfMoeConfig
from ..construction.packaged import PACKAGED
from ..construction.pretrained import load_language_model
from ..construction.tokenizer import default_chat_template
from ..data import FeatureCache, TextProcessor, VisionLanguageCollator, tokenize_rows
from ..data.chat_template import AnyProcessor
from ..data.text import tokenizer_or_processor
from ..evaluation.vqa import evaluate_vqa
from ..hub.adapter_card import write_adapter_card
from ..modeling.inputs import conditions_read
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import host_parts, part_of
from .arguments import training_arguments
from .job import Job, autocast, run_trainer
from .logs import LogRouting
from .processors import load_processor
from .recipe import adapter_config
from .stages import kept_features


class AdapterJob(Job):
    """A recipe that trains an adapter; the base is frozen."""

    features: FeatureCache | None

    def build(self) -> None:
        base, self.processor = load_base(self.recipe.model)
        self._take(base, get_peft_model(base, adapter_config(self.recipe.adapter or {})))

    def open(self, folder: Path) -> None:
        base, self.processor = load_base(self.recipe.model)
        self._take(base, PeftModel.from_pretrained(base, folder, is_trainable=True))

    def _take(self, base: Any, model: PeftModel) -> None:
        """Take the model, and check that the rows hold what its routers read."""
        self.model = model
        self.conditions = sorted(conditions_read(index_of(model).routers()))
        for part, part_rows in self.rows.items():
            for name in self.conditions:
                if f"{name}_ids" not in (part_rows.column_names or ()):
                    raise ValueError(
                        f"The router reads the condition {name!r}, and the rows of data.{part} have no column "
                        f"{name}_ids; they have {', '.join(part_rows.column_names or ())}."
                    )
        self.features = None
        if isinstance(base, HfMoeForConditionalGeneration):
            parts = host_parts(model)
            trained = {part_of(name, parts) for name, item in model.named_parameters() if item.requires_grad}
            self.features = kept_features(self.recipe, base, self.processor, self.rows, trained, self.folder)

    def train(self, resume: bool) -> dict[str, Any]:
        recipe, processor = self.recipe, self.processor
        trainer = Trainer(
            model=self.model,
            args=training_arguments(recipe.training, recipe.seed, self.folder),
            train_dataset=tokenize_rows(self.rows["train"], processor),
            data_collator=VisionLanguageCollator(
                processor, recipe.data.get("max_length"), self.features, conditions=self.conditions
            ),
            processing_class=tokenizer_or_processor(processor),
            callbacks=[LogRouting()],
        )
        parameters: Counter[str] = Counter()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameters["routers" if "moe_lora_router" in name else "experts"] += parameter.numel()
        return {"trainable_parameters": dict(parameters), **run_trainer(trainer, self.folder, resume)}

    # An adapter is small: it is written as it will be.
    save_settings = Job.save

    def score(self, rows: Any) -> dict[str, Any]:
        wanted = self.recipe.evaluation
        options = {"feature_cache": self.features, "batch_size": wanted.get("batch_size", 64)}
        with autocast(self.model, wanted):
            result = evaluate_vqa(self.model, self.processor, rows, conditions=self.conditions, **options)
            with self.model.disable_adapter():
                untouched = evaluate_vqa(self.model, self.processor, rows, **options)
        report = {"evaluated": result["count"]}
        for prefix, scored in (("", result), ("base_", untouched)):
            for name in ("accuracy", "accuracy_by_question_type"):
                report[prefix + name] = scored[name]
        return report

    def describe(self, folder: Path, report: dict[str, Any]) -> None:
        recipe = self.recipe
        write_adapter_card(folder, model=self.model, report=report, recipe=recipe.to_dict(), **recipe.card)


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
            return base, load_processor(base, source, revision=revision)
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
