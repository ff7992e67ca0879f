"""The trainer logs what the model does; the losses themselves are tested without it."""

import copy
import math
from dataclasses import fields

import pytest
import torch
from peft import get_peft_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor, MoeLoraConfig
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.training.trainer import HfMoeTrainer


IMAGE = 39


TEXT = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=40)


def make_model(objectives=None, **fields) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    objectives = {"load_balance": 0.01, "router_z": 0.001} if objectives is None else objectives
    moe = {"num_experts": 4, "router": {"name": "moiie"}, "objectives": objectives}
    text = copy.deepcopy(TEXT)
    config = HfMoeConfig(text_config=text, vision_config=vision, moe_config=moe, image_token_id=IMAGE, **fields)
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
    assert trainer.model.training_progress == 3 / 4


def evaluation(model, folder, rows=None, trainer_class=Trainer, **options) -> Trainer:
    arguments = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": "none"}
    options = {"data_collator": collate, **options}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **arguments)
    return trainer_class(model, arguments, eval_dataset=rows or make_rows(5), **options)


def test_every_field_but_the_logits_is_ignored_at_inference():
    model = make_model()
    output = model(input_ids=torch.ones(1, 4, dtype=torch.long))
    names = {field.name for field in fields(output)}
    assert set(model.config.keys_to_ignore_at_inference) == names - {"loss", "logits"}


@pytest.mark.parametrize("options", [{}, {"output_router_logits": True}, {"output_hidden_states": True}], ids=str)
@pytest.mark.parametrize("trainer_class", [Trainer, HfMoeTrainer])
def test_metrics_get_the_logits_alone(tmp_path, trainer_class, options):
    seen = {}

    def keep(logits, labels):
        seen["preprocessed"] = logits.shape
        return logits.argmax(-1)

    def metrics(prediction):
        seen["predictions"] = prediction.predictions.shape
        return {}

    for preprocess in (None, keep):
        model = make_model(**options)
        trainer = evaluation(
            model,
            tmp_path,
            trainer_class=trainer_class,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=preprocess,
        )
        trainer.evaluate()
        assert seen["predictions"] == ((5, 12, 40) if preprocess is None else (5, 12))
        assert trainer.predict(make_rows(3)).predictions.shape[:2] == (3, 12)
    assert seen["preprocessed"][1:] == (12, 40)


@pytest.mark.parametrize("trainer_class", [Trainer, HfMoeTrainer])
def test_the_evaluation_loss_is_the_language_loss(tmp_path, trainer_class):
    expected = evaluation(make_model(objectives={}), tmp_path).evaluate()["eval_loss"]
    model = make_model(objectives={"load_balance": 3.0, "router_z": 2.0})
    trainer = evaluation(model, tmp_path, trainer_class=trainer_class)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected)
    rows = collate(make_rows(5))
    assert model(**rows).loss > expected + 3, "with gradients it is the loss that trains"
    if trainer_class is HfMoeTrainer:
        values = model(**rows).objective_values
        for name, value in values.items():
            assert metrics[f"eval_objective/{name}"] == pytest.approx(value.item(), rel=1e-4)


def test_the_evaluation_loss_of_lora_experts_is_the_base_models(tmp_path):
    losses = {}
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        config = MoeLoraConfig(target_modules=["q_proj"], objectives={"router_z": coefficient})
        model = get_peft_model(LlamaForCausalLM(TEXT), config)
        trainer = evaluation(model, tmp_path, data_collator=None)
        losses[coefficient] = trainer.evaluate()["eval_loss"]
        assert trainer.predict(make_rows(3)).predictions.shape == (3, 12, 40)
    assert losses[5.0] == pytest.approx(losses[0.0])


def test_rows_are_grouped_by_the_length_of_their_ids(tmp_path):
    tokenizer = train_word_tokenizer(["a b c"])
    processor = HfMoeProcessor(CLIPImageProcessor(), tokenizer, image_seq_length=4)
    assert processor.model_input_names[0] == "input_ids"
    assert {"mm_token_type_ids", "pixel_values"} <= set(processor.model_input_names)
    rows = [{"pixel_values": torch.ones(3, 16, 16), "input_ids": [1] * length} for length in (3, 9, 4, 8)]
    arguments = TrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length", use_cpu=True)
    trainer = Trainer(make_model(), arguments, train_dataset=rows, processing_class=processor)
    assert trainer._get_train_sampler(rows).lengths == [3, 9, 4, 8]
