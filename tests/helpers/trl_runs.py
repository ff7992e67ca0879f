"""Short training runs with TRL's trainers and with plain `Trainer`, shared by the tests of models and adapters."""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_moe.modeling import auxiliary


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({f"w{index}": index for index in range(60)}, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2")


def rows() -> Dataset:
    """Return sixteen rows of different length, of which a different part is to be learned."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(16):
        ids = torch.randint(3, 60, (6 + 5 * (index % 4),), generator=generator).tolist()
        prompt = 2 + index % 3
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * (len(ids) - prompt)})
    return Dataset.from_list(rows)


def arguments(kind: type, folder: Path, accumulation: int = 1, **fields) -> TrainingArguments:
    """Return arguments that make every optimizer step one of eight rows."""
    defaults = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": kind is not TrainingArguments,
    }
    return kind(str(folder), **{**defaults, **fields})


class RecordGradients(TrainerCallback):
    """Keeps the gradients of some parameters at the moment the optimizer steps."""

    def __init__(self, part: str):
        self.part = part
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if self.part in name and p.grad is not None})


def fine_tune(model, folder, accumulation=1, part="", callbacks=(), **fields) -> tuple[list, SFTTrainer]:
    """Train two optimizer steps with TRL; return the gradients of both and the trainer."""
    record = RecordGradients(part)
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, folder, accumulation, completion_only_loss=True, **fields),
        train_dataset=rows(),
        processing_class=tokenizer(),
        callbacks=[record, *callbacks],
    )
    trainer.train()
    return record.steps, trainer


def plain_train(model, folder, like: SFTTrainer, part="", callbacks=()) -> tuple[list, Trainer]:
    """Train on the same batches with the loss that the model returns."""
    record = RecordGradients(part)
    trainer = Trainer(
        model,
        arguments(TrainingArguments, folder),
        train_dataset=like.train_dataset,
        data_collator=like.data_collator,
        callbacks=[record, *callbacks],
    )
    trainer.train()
    return record.steps, trainer


def assert_same_steps(found: list, expected: list) -> None:
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp(min=1.0), name


def warnings_of(call: Callable) -> str:
    """Return what is logged about objectives without labels."""
    logging.get_logger(auxiliary.__name__).warning_once.cache_clear()
    with CaptureLogger(auxiliary.logger) as captured:
        call()
    return captured.out
