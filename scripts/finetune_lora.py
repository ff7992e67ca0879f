# /// script
# dependencies = ["hf-moe[train]"]
# ///
"""
Fine-tunes LoRA experts on a frozen model with `Trainer`. Copy it and change it.

# A published system
```bash
python scripts/finetune_lora.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --system mixlora \
    --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \
    --learning_rate 2.0e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --bf16 \
    --output_dir qwen2.5-vl-mixlora \
    --push_to_hub
```

# Experts of your own
```bash
python scripts/finetune_lora.py \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --adapter_config '{"target_modules": ["q_proj", "v_proj"], "num_experts": 4, "r": 8}' \
    --dataset_name rows.jsonl \
    --output_dir smollm2-experts
```

The base is any model of Transformers, or a checkpoint of hf_moe. Rows hold `messages` and `images`, `videos` or
`audios`, and for routers that read a condition `<condition>_ids`; `--dataset_name` is a dataset of the Hub, a folder,
or a file of rows.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import get_peft_model
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_moe
from hf_moe import MoeLoraConfig
from hf_moe.adapters.index import index_of
from hf_moe.data import VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.text import tokenizer_or_processor
from hf_moe.modeling.inputs import conditions_read
from hf_moe.training.logs import LogRouting
from hf_moe.training.processors import load_processor


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the base, which is frozen."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    system: str | None = field(default=None, metadata={"help": "A system of adapters, of `hf-moe list systems`."})
    variant: str | None = field(default=None, metadata={"help": "Which of the system's variants."})
    adapter_config: str | None = field(
        default=None, metadata={"help": "Fields of `MoeLoraConfig` as JSON, over those of the system."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "Of the base's weights."})


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


def load_base(args: ModelArguments) -> tuple[Any, Any]:
    """Return the base and its processor."""
    source, revision = args.model_name_or_path, args.model_revision
    config = AutoConfig.from_pretrained(source, revision=revision)
    seeing = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    auto_class = AutoModelForMultimodalLM if seeing else AutoModelForCausalLM
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    base = auto_class.from_pretrained(source, revision=revision, dtype=dtype)
    return base, load_processor(base, source, revision=revision)


def main(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    hf_moe.register()
    base, processor = load_base(model_args)
    fields = json.loads(model_args.adapter_config) if model_args.adapter_config else {}
    if model_args.system is None:
        config = MoeLoraConfig(**fields)
    else:
        config = MoeLoraConfig.from_system(model_args.system, variant=model_args.variant, **fields)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    training_args.remove_unused_columns = False
    conditions = sorted(conditions_read(index_of(model).routers()))
    evaluates = training_args.eval_strategy != "no"
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=VisionLanguageCollator(
            processor, data_args.max_length, conditions=conditions, config=base.config
        ),
        train_dataset=tokenize_rows(data_args.rows(data_args.train_split), processor),
        eval_dataset=tokenize_rows(data_args.rows(data_args.eval_split), processor) if evaluates else None,
        processing_class=tokenizer_or_processor(processor),
        callbacks=[LogRouting()],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*HfArgumentParser((ModelArguments, DataArguments, TrainingArguments)).parse_args_into_dataclasses())
