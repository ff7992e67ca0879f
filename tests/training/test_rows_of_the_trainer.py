"""Rows of every form reach the collator whole, under the defaults of `TrainingArguments`."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, Image, List
from torch import multiprocessing
from transformers import TrainingArguments

from hf_moe.data import VisionLanguageCollator, tokenize_rows
from hf_moe.data.rows import MESSAGES
from hf_moe.training.trainer import HfMoeTrainer


def dataset_of(rows):
    parts = [
        {
            **row,
            "messages": [
                {**turn, "content": [{"text": None, **part} for part in turn["content"]]} for turn in row["messages"]
            ],
            "image_id": [row["image_id"]] if isinstance(row["image_id"], str) else row["image_id"] or [],
        }
        for row in rows
    ]
    return Dataset.from_list(parts).cast_column("messages", MESSAGES).cast_column("images", List(Image()))


FORMS = {
    "list": lambda rows, processor: rows,
    "dataset": lambda rows, processor: dataset_of(rows),
    "stream": lambda rows, processor: dataset_of(rows).to_iterable_dataset(),
    "tokenised": lambda rows, processor: tokenize_rows(dataset_of(rows), processor),
    "tokenised stream": lambda rows, processor: tokenize_rows(dataset_of(rows).to_iterable_dataset(), processor),
}


def losses(model, processor, rows, folder, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "train_sampling_strategy": "sequential"}
    settings |= options
    trainer = HfMoeTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows,
        data_collator=VisionLanguageCollator(processor),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_form_of_rows_trains_alike_under_default_arguments(vlm, processor, rows, tmp_path):
    state = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    found = {}
    for name, form in FORMS.items():
        vlm.load_state_dict(state)
        found[name] = losses(vlm, processor, form(rows, processor), tmp_path)
    assert len(found["list"]) == 2
    assert all(values == pytest.approx(found["list"]) for values in found.values()), found


@pytest.mark.parametrize(
    ("form", "given", "expected"), [("stream", None, False), ("stream", True, True), ("dataset", None, None)]
)
def test_a_stream_is_read_by_every_process_unless_said_otherwise(
    vlm, processor, rows, tmp_path, form, given, expected
):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    arguments.accelerator_config.dispatch_batches = given
    data = FORMS[form](rows, processor)
    HfMoeTrainer(vlm, arguments, train_dataset=data, data_collator=VisionLanguageCollator(processor))
    assert arguments.accelerator_config.dispatch_batches is expected


def test_images_beside_another_batch_name_what_may_have_parted_them(vlm, processor, rows):
    batch = VisionLanguageCollator(processor)(rows)
    batch["pixel_values"] = batch["pixel_values"][:-1]
    with pytest.raises(ValueError, match="(?s)do not match.*dispatch_batches=False"):
        vlm(**batch)


def train_as_one_of_two(rank, port, vlm, processor, rows, folder, results):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    # Both processes see all rows of a stream: each takes its own batches.
    results[rank] = losses(vlm, processor, dataset_of(rows).to_iterable_dataset(), folder, max_steps=1)
    dist.destroy_process_group()


def test_a_stream_with_several_images_a_row_trains_on_two_processes(vlm, processor, rows, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Manager().dict()
    arguments = (port, vlm, processor, rows, tmp_path, results)
    multiprocessing.spawn(train_as_one_of_two, arguments, nprocs=2)
    assert len(results[0]) == 1 and results[0] == results[1]


def test_rows_without_images_train_a_model_with_a_tower(vlm, processor, rows, tmp_path):
    text = [rows[1]] * 4
    for form in ("list", "dataset", "stream"):
        assert len(losses(vlm, processor, FORMS[form](text, processor), tmp_path)) == 2
