"""Statistics are counted exactly, whatever the loop: the same table for our models and for LoRA experts."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers.training_loops import LOOPS, ROUTER, STEPS, SUBJECTS, Subject, adapted, batch, own, own_model, sgd, watch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe.training.trainer import HfMoeTrainer


@pytest.fixture(params=SUBJECTS)
def subject(request) -> Subject:
    return SUBJECTS[request.param]()


def assert_counted(subject: Subject, passes: int, steps: int = STEPS) -> None:
    """`steps` steps of so many forward passes each, and nothing left over."""
    assert subject.closed == [passes * subject.slots] * steps
    assert subject.population == passes * subject.slots
    assert subject.left == 0


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_loop_counts_its_steps(subject, loop):
    assert_counted(subject, loop(subject))


def test_the_bias_moves_with_every_step(subject):
    optimizer = sgd(subject)
    for step in range(1, STEPS + 1):
        before = subject.router.e_score_correction_bias.clone()
        subject.loss().backward()
        optimizer.step()
        moved = subject.router.e_score_correction_bias - before
        assert moved.abs().max() == ROUTER["bias_update_rate"], step


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("skipped", [0, 2])
def test_a_skipped_step_is_carried_into_the_next(subject, fused, skipped):
    optimizer = torch.optim.AdamW(subject.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(4):
        scaler.scale(subject.loss()).backward()
        if step == skipped:
            next(p for p in subject.parameters() if p.grad is not None).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    expected = [subject.slots] * 3
    expected[skipped] *= 2
    assert subject.closed == expected
    assert subject.left == 0


def test_one_optimizer_steps_two_models():
    subjects = [own(), adapted()]
    optimizer = torch.optim.SGD([p for subject in subjects for p in subject.parameters()], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(subject.loss() for subject in subjects).backward()
        optimizer.step()
    for subject in subjects:
        assert_counted(subject, 1)


def test_frozen_routers_are_followed(subject):
    subject.router.requires_grad_(False)
    optimizer = sgd(subject)
    for _ in range(STEPS):
        subject.loss().backward()
        optimizer.step()
    assert_counted(subject, 1)


def test_lora_on_attention_closes_and_leaves_the_bias():
    model = own_model()
    subject = watch(model, model.moe_layers()[1].router, model.objectives.by_name["load_balance"])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(STEPS):
        peft_model(**batch()).loss.backward()
        optimizer.step()
    assert subject.population == subject.slots
    assert subject.left == 0
    assert not subject.router.e_score_correction_bias.any(), "no adapter would save it"


def test_lora_with_a_gate_of_its_own_moves_that_bias():
    model = own_model()
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    peft_model(**batch()).loss.backward()
    optimizer.step()
    biases = {n: b for n, b in peft_model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert [name for name, bias in biases.items() if bias.any()] == [n for n in biases if "modules_to_save" in n]


def test_own_models_and_their_adapters_count_together():
    subject = own()
    config = SUBJECTS["adapters"]().model.peft_config["default"]
    model = get_peft_model(subject.model, copy.deepcopy(config)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(STEPS):
        model(**batch()).loss.backward()
        optimizer.step()
    populations = [buffer.sum() for name, buffer in model.named_buffers() if "population" in name]
    assert populations == [subject.slots] * 2


def test_a_model_is_not_kept_alive_by_its_statistics(subject):
    subject.loss().backward()
    model = weakref.ref(subject.model)
    del subject.model, subject.router.end_step, subject.router, subject.objective
    gc.collect()
    assert model() is None


def test_an_unpickled_model_goes_on_counting():
    model = own_model()
    model(**batch()).loss.backward()
    model = pickle.loads(pickle.dumps(model))
    subject = watch(model, model.moe_layers()[1].router, model.objectives.by_name["load_balance"])
    sgd(subject).step()
    assert_counted(subject, 1, steps=1)


def test_a_loop_may_close_its_steps_by_hand():
    subject = own()
    for _ in range(STEPS):
        subject.loss().backward()
        subject.model.end_step()
    assert_counted(subject, 1)


def test_a_compiled_step_closes(subject):
    optimizer = torch.optim.AdamW(subject.parameters(), lr=torch.tensor(0.01))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        subject.loss().backward()
        step()
    torch._dynamo.reset()
    assert_counted(subject, 1, steps=2)


def test_a_compiled_model_counts_its_steps():
    model = own_model()
    model.set_experts_implementation("grouped_mm")
    subject = watch(model, model.moe_layers()[1].router, model.objectives.by_name["load_balance"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = sgd(subject)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(**batch()).loss.backward()
        optimizer.step()
    torch._dynamo.reset()
    assert_counted(subject, 1, steps=2)


@pytest.mark.parametrize("trainer_class", [Trainer, HfMoeTrainer])
def test_trainer_counts_its_steps_under_accumulation(trainer_class, tmp_path):
    subject = own()
    rows = [{name: value[0] for name, value in batch().items()}] * 24
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer_class(subject.model, arguments, train_dataset=rows).train()
    assert subject.closed == [4 * 2 * 7 * 2] * 3
    assert subject.left == 0
