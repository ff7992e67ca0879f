"""The trainer logs what the model does; the losses themselves are tested without it."""

import math

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.training.trainer import HfMoeTrainer


IMAGE = 39


def make_model() -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    moe = {"num_experts": 4, "router": {"name": "moiie"}, "objectives": {"load_balance": 0.01, "router_z": 0.001}}
    config = HfMoeConfig(text_config=text, vision_config=vision, moe_config=moe, image_token_id=IMAGE)
    return HfMoeForConditionalGeneration(config)


def make_rows(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, 30, (12,), generator=generator)
        ids[2:6] = IMAGE
        rows.append({"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)})
    return rows


def collate(rows: list[dict]) -> dict:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "pixel_values": torch.ones(len(rows), 3, 16, 16)}


def train(trainer_class: type, folder, **options) -> Trainer:
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 1e-2}
    arguments |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 0, **options}
    args = TrainingArguments(output_dir=str(folder), **arguments)
    trainer = trainer_class(model=make_model(), args=args, train_dataset=make_rows(), data_collator=collate)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return train(HfMoeTrainer, tmp_path_factory.mktemp("run"), gradient_accumulation_steps=2)


def test_it_logs_every_objective_and_a_fixed_set_of_routing_figures(trainer):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        # Both are means over the labels of a step: near 1 for a balanced router, near log(3)^2 for three candidates.
        assert 0.5 < entry["objective/load_balance"] < 3.0
        assert 0.5 < entry["objective/router_z"] < 3.0
        figures = {name.removeprefix("routing/") for name in entry if name.startswith("routing/")}
        assert figures == {
            f"{modality}/{group}/{figure}"
            for modality in ("text", "image")
            for group in ("early", "middle", "late")
            for figure in ("active", "entropy", "largest", "empty")
        }
        assert entry["routing/text/early/active"] == 2.0 and entry["routing/text/early/empty"] == 0.0
        assert 0 < entry["routing/image/late/entropy"] <= math.log(3) / math.log(4) + 1e-6


def test_it_trains_as_plain_trainer_does(trainer, tmp_path):
    plain = train(Trainer, tmp_path, gradient_accumulation_steps=2)
    theirs = dict(plain.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_progress_reaches_the_model_and_ends_below_one(trainer):
    assert trainer.model.model.training_progress == 3 / 4


def test_evaluation_returns_logits_without_the_routing(trainer):
    result = trainer.predict(make_rows(4))
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    assert logits.shape == (4, 12, 40)
