"""Two processes train a host as one does: with unreachable parameters, and where one of them has text alone."""

import os
import socket

import pytest
import torch
from torch import multiprocessing
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TrainingArguments,
)

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.parts import PARTS, host_parts, part_of
from hf_moe.training.parts import train_only
from hf_moe.training.trainer import HfMoeTrainer


WORLD = 2
IMAGE = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "objectives": {}}
IMAGES = 4  # tokens of one


def gemma3():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 8},
        vision_config={**vision, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
        image_token_id=IMAGE,
        mm_tokens_per_image=IMAGES,
    )
    return HfMoeConfig.on_host(config, Gemma3ForConditionalGeneration.__name__, moe_config=MOE)


def qwen2_5_vl():
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return HfMoeConfig.on_host(config, Qwen2_5_VLForConditionalGeneration.__name__, moe_config=MOE)


HOSTS = {"gemma3": gemma3, "qwen2_5_vl": qwen2_5_vl}


def rows(name: str, pictured: tuple[bool, ...]) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, of which some have an image."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for has_image in pictured:
        ids = torch.randint(1, 50, (12,), generator=generator)
        row = {"input_ids": ids, "labels": ids.clone()}
        if has_image:
            ids[2 : 2 + IMAGES] = IMAGE
            row["labels"][2 : 2 + IMAGES] = -100
            sizes = {"gemma3": (1, 3, 8, 8), "qwen2_5_vl": (16, 3 * 2 * 4 * 4)}[name]
            row["pixel_values"] = torch.randn(*sizes, generator=generator)
            if name == "qwen2_5_vl":
                row["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        made.append(row)
    return made


def collate(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in found]) for name in ("input_ids", "labels")}
    for name in ("pixel_values", "image_grid_thw"):
        if any(name in row for row in found):
            batch[name] = torch.cat([row[name] for row in found if name in row])
    types = (batch["input_ids"] == IMAGE).long()
    return {**batch, "attention_mask": torch.ones_like(types), "mm_token_type_ids": types}


def train(name: str, pictured: tuple[bool, ...], folder, batch_size: int, **options) -> dict[str, torch.Tensor]:
    """Return what two steps of SGD make of a host."""
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration(HOSTS[name]())
    train_only(model, PARTS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=batch_size,
        max_steps=2,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_timeout=60,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = HfMoeTrainer(model=model, args=arguments, train_dataset=rows(name, pictured), data_collator=collate)
    trainer.train()
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


# The rows of two processes and two steps: all have images, or one process has text alone. Without checkpointing
# `Trainer` itself looks for unused parameters.
CHECKPOINTING = {"gradient_checkpointing": True}
CASES = {
    "gemma3 with an unreachable head": ("gemma3", (True,) * 4, CHECKPOINTING),
    "gemma3 beside text": ("gemma3", (True, False, False, True), CHECKPOINTING),
    "qwen2_5_vl beside text": ("qwen2_5_vl", (True, False, False, True), CHECKPOINTING),
}


def worker(rank: int, port: int, folder) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    for case, (name, pictured, options) in CASES.items():
        torch.save(train(name, pictured, folder, 1, **options), folder / f"{case} {rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, found), nprocs=WORLD)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_a_host_as_one_does(folder, tmp_path, case):
    name, pictured, options = CASES[case]
    expected = train(name, pictured, tmp_path, WORLD, **options)
    for rank in range(WORLD):
        found = torch.load(folder / f"{case} {rank}.pt")
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5
    torch.manual_seed(0)
    model = HfMoeForConditionalGeneration(HOSTS[name]())
    parts, start = host_parts(model), dict(model.named_parameters())
    moved = {part_of(key, parts) for key in expected if not torch.equal(start[key], expected[key])}
    assert moved == set(PARTS)
