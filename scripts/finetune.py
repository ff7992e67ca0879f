# /// script
# dependencies = ["hf-moe[train]"]
# ///
"""
Fine-tunes a multimodal Mixture-of-Experts model with `Trainer`. Copy it and change it.

# A model of Transformers, which becomes a MoE in place
```bash
python scripts/finetune.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --system moiie \
    --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \
    --trainable connector routers experts \
    --learning_rate 2.0e-5 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --bf16 \
    --output_dir qwen2.5-vl-moiie \
    --push_to_hub
```

# A decoder and a vision tower, put together
```bash
python scripts/finetune.py \
    --language_model HuggingFaceTB/SmolLM2-135M-Instruct \
    --vision_tower google/siglip-base-patch16-224 \
    --system moe_llava \
    --dataset_name rows.jsonl \
    --output_dir smollm2-moe-llava
```

`--model_name_or_path` also takes a checkpoint of hf_moe, which is trained further. Rows hold `messages` and `images`,
`videos` or `audios`; `--dataset_name` is a dataset of the Hub, a folder, or a file of rows.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoConfig, HfArgumentParser, TrainingArguments

import hf_moe
from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.build import build_model
from hf_moe.data import VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.text import tokenizer_or_processor
from hf_moe.training.parts import train_only
from hf_moe.training.processors import as_processor, load_processor
from hf_moe.training.trainer import HfMoeTrainer


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a model of Transformers, or of a checkpoint of hf_moe."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    language_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a decoder, in place of --model_name_or_path."}
    )
    vision_tower: str | None = field(default=None, metadata={"help": "Hub id or folder of its vision tower."})
    system: str | None = field(default=None, metadata={"help": "A key of `hf-moe list systems`."})
    moe_config: str | None = field(
        default=None, metadata={"help": "Fields that override the system's, as JSON: '{\"num_experts\": 8}'."}
    )
    trainable: list[str] = field(
        default_factory=lambda: ["connector", "routers", "experts", "embeddings", "backbone"],
        metadata={"help": "Parts that are trained: tower, connector, routers, experts, embeddings, backbone."},
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of the weights."})


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": "A dataset of the Hub, a folder, or a file of rows."})
    dataset_config: str | None = field(default=None, metadata={"help": "Of a dataset of the Hub."})
    train_split: str = field(default="train", metadata={"help": "The rows to train on."})
    eval_split: str = field(default="test", metadata={"help": "The rows of --eval_strategy."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per row."})

    def rows(self, split: str) -> Any:
        if self.dataset_config is None:
            return load_rows(self.dataset_name, split)
        return load_rows({"hub": self.dataset_name, "name": self.dataset_config}, split)


def load_model(args: ModelArguments, seed: int) -> tuple[HfMoeForConditionalGeneration, Any]:
    """Return the model and its processor."""
    if (args.model_name_or_path is None) == (args.language_model is None):
        raise ValueError("Give one of --model_name_or_path and --language_model.")
    moe_config = json.loads(args.moe_config) if args.moe_config else None
    options = {"system": args.system, "moe_config": moe_config, "seed": seed, "dtype": getattr(torch, args.dtype)}
    if args.language_model is not None:
        model, processor = build_model(args.language_model, args.vision_tower, **options)
        return model, as_processor(processor)
    source, revision = args.model_name_or_path, args.model_revision
    if isinstance(AutoConfig.from_pretrained(source, revision=revision), HfMoeConfig):
        model = HfMoeForConditionalGeneration.from_pretrained(source, revision=revision, dtype=options["dtype"])
    else:
        model = HfMoeForConditionalGeneration.from_host(source, revision=revision, **options)
    return model, load_processor(model, source, revision=revision)


def main(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    hf_moe.register()
    model, processor = load_model(model_args, training_args.seed)
    train_only(model, model_args.trainable)

    evaluates = training_args.eval_strategy != "no"
    trainer = HfMoeTrainer(
        model=model,
        args=training_args,
        data_collator=VisionLanguageCollator(processor, data_args.max_length, config=model.config),
        train_dataset=tokenize_rows(data_args.rows(data_args.train_split), processor),
        eval_dataset=tokenize_rows(data_args.rows(data_args.eval_split), processor) if evaluates else None,
        processing_class=tokenizer_or_processor(processor),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*HfArgumentParser((ModelArguments, DataArguments, TrainingArguments)).parse_args_into_dataclasses())
