"""TRL's `SFTTrainer` on hosts in place: rows of images and of text alone, with the objectives in the loss."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.hosts.processors import HOSTS
from helpers.trl_runs import RecordGradients, arguments, assert_same_steps
from PIL import Image
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.data import VisionLanguageCollator


def rows():
    colours = ["red", "blue", "green", "white"]
    found = []
    for index in range(16):
        image = [{"type": "image"}] if index % 4 else []
        user = {"role": "user", "content": [*image, {"type": "text", "text": "what is it?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a thing"}]}
        pictures = [Image.new("RGB", (16, 16), colours[index % 4])] if image else []
        found.append({"messages": [user, answer], "images": pictures})
    return found


def train(kind, config, model, host, folder, accumulation, **fields):
    """Train two steps of eight rows, and return the gradients of the gates."""
    record = RecordGradients(".gate.")
    options = arguments(config, folder, accumulation, **fields)
    options.remove_unused_columns = False
    trainer = kind(
        model,
        options,
        data_collator=VisionLanguageCollator(host.processor),
        train_dataset=Dataset.from_list(rows()),
        processing_class=host.processor,
        callbacks=[record],
    )
    trainer.train()
    return record.steps


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_sft_on_images_trains_the_gates_as_the_models_loss_does(name, tmp_path):
    torch.manual_seed(0)
    host = HOSTS[name]()
    objectives = {"load_balance": {"coef": 0.3, "scope": "sequence"}}
    model = HfMoeForConditionalGeneration.from_host(
        host.model(), moe_config={"num_experts": 3, "num_experts_per_tok": 2, "objectives": objectives}, noise=0.3
    )
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    expected = train(Trainer, TrainingArguments, copy.deepcopy(model), host, tmp_path, 1)
    for accumulation, checkpointing in ((1, False), (4, True)):
        fields = {**skip, "gradient_checkpointing": checkpointing}
        steps = train(SFTTrainer, SFTConfig, copy.deepcopy(model), host, tmp_path, accumulation, **fields)
        assert_same_steps(steps, expected)
