"""The loss: objectives weigh the same however rows are split over micro-batches, through plain `Trainer`."""

import copy

import pytest
import torch
from helpers.image_rows import IMAGE, collate, labels_of, row
from helpers.near import assert_near
from transformers import Trainer, TrainerCallback, TrainingArguments


OBJECTIVES = {"load_balance": 0.3, "router_z": 0.1}
PER_GATE = {"load_balance": {"coef": 0.3, "per_gate": True, "shares": "tokens", "layer_reduction": "sum"}}
SEQUENCE = {"load_balance": {"coef": 0.3, "scope": "sequence"}, "null_load": 0.1}


def example(index):
    """One row of its own length, whose first words carry no labels."""
    item = row(index % 3, 6 + 5 * (index % 4), seed=index)
    batch = collate([item])
    labels = labels_of(batch)[0]
    labels[: 1 + index % 5] = -100
    return {**item, "labels": labels}


def collator(items):
    batch = collate(items)
    width = batch["input_ids"].shape[1]
    labels = [torch.nn.functional.pad(item["labels"], (width - len(item["labels"]), 0), value=-100) for item in items]
    return {**batch, "labels": torch.stack(labels)}


class RecordGradients(TrainerCallback):
    """Keeps the routers' gradients at the moment the optimizer steps."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gates = {name: p.grad.clone() for name, p in model.named_parameters() if ".gate." in name}
        self.steps.append(gates)


def train(model, rows, accumulation, folder):
    """Two optimizer steps of eight rows; returns the routers' gradients of both and the logged losses."""
    record = RecordGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[record])
    trainer.train()
    return record.steps, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("router", "objectives"),
    [("top_k", OBJECTIVES), ("moiie", OBJECTIVES), ("adamoe", SEQUENCE), ("moiie", PER_GATE)],
    ids=["population", "population_per_gate", "sequence", "term_per_gate"],
)
def test_router_gradients_do_not_depend_on_the_split_into_micro_batches(tiny_model, tmp_path, router, objectives):
    model = tiny_model(moe_config={"router": {"name": router}, "objectives": objectives})
    rows = [example(index) for index in range(16)]
    reference, losses = train(copy.deepcopy(model), rows, 1, tmp_path)
    assert len(reference) == 2
    for accumulation in (4, 8):
        steps, other_losses = train(copy.deepcopy(model), rows, accumulation, tmp_path)
        assert other_losses == pytest.approx(losses, rel=1e-4)
        for expected, actual in zip(reference, steps, strict=True):
            for name, gradient in expected.items():
                scale = gradient.abs().max()
                assert scale > 1e-4, name
                assert (actual[name] - gradient).abs().max() < 1e-4 * scale, name


def test_objectives_carry_a_good_part_of_the_router_gradient(tiny_model, training_batch):
    """The test above would pass on objectives too weak to matter."""
    gradients = []
    for objectives in ({}, OBJECTIVES):
        model = tiny_model(moe_config={"objectives": objectives}).train()
        model(**training_batch).loss.backward()
        gradients.append(model.moe_layers()[1].gate.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 0.1 * gradients[1].abs().max()


def test_loss_is_the_language_loss_plus_row_values_by_their_share_of_labels(tiny_model):
    model = tiny_model(moe_config={"objectives": SEQUENCE, "router": {"name": "adamoe"}})
    items = [example(index) for index in range(4)]
    together = model(**collator(items))
    counts = [(item["labels"][1:] != -100).sum().item() for item in items]
    assert len(set(counts)) > 1
    total = sum(counts)
    singles = [model(**collator([item])) for item in items]
    expected = sum(count / total * single.loss for count, single in zip(counts, singles, strict=True))
    assert together.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    values = together.objective_values
    by_hand = 0.3 * values["load_balance"] + 0.1 * values["null_load"]
    assert together.aux_loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    plain = model(**{**collator(items), "labels": None}).logits
    language = torch.nn.functional.cross_entropy(
        plain[:, :-1].flatten(0, 1), collator(items)["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert (together.loss - together.aux_loss).item() == pytest.approx(language.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_the_loss_or_the_router_gradients(tiny_model, side):
    model = tiny_model(moe_config={"objectives": OBJECTIVES}).train()
    batch = collate([row(1, 6, 0), row(2, 9, 1)])
    padding = (7, 0) if side == "left" else (0, 7)
    padded = {
        name: torch.nn.functional.pad(batch[name], padding) if name != "pixel_values" else batch[name]
        for name in batch
    }
    found = []
    for inputs in (batch, padded):
        for statistic in model.objectives.buffers():
            statistic.zero_()
        outputs = model(**inputs, labels=labels_of(inputs))
        outputs.loss.backward()
        found.append((outputs.loss, outputs.aux_loss, model.moe_layers()[2].gate.weight.grad.clone()))
        model.zero_grad()
    for plain, with_padding in zip(*found, strict=True):
        assert_near(with_padding, plain)


def test_a_batch_without_labels_has_no_auxiliary_loss_and_a_finite_one(tiny_model, batch):
    model = tiny_model(moe_config={"objectives": OBJECTIVES}).train()
    assert model(**batch).aux_loss is None
    outputs = model(**batch, labels=torch.full_like(batch["input_ids"], -100), num_items_in_batch=10)
    assert outputs.aux_loss == 0


def test_image_tokens_take_part_in_the_balance(tiny_model, training_batch):
    model = tiny_model(moe_config={"objectives": OBJECTIVES}).train()
    model(**training_batch).loss.backward()
    counted = model.objectives.by_name["load_balance"].get_buffer("accumulated_1").sum()
    assert (training_batch["input_ids"] == IMAGE).sum() > 0
    assert counted == 2 * training_batch["attention_mask"].sum()
