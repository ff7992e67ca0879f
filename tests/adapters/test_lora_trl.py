"""LoRA experts under TRL's trainers, whose loss is made outside of the model."""

import pytest
import torch
from datasets import Dataset
from helpers.trl_runs import arguments, assert_same_steps, fine_tune, plain_train, tokenizer, warnings_of
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from hf_moe import MoeLoraConfig
from hf_moe.training.logs import LogRouting


@pytest.fixture
def adapt(llama, randomise):
    """Build an adapted model, the same one every time."""

    def build(base=llama, **fields):
        defaults = {
            "target_modules": ["q_proj", "down_proj"],
            "objectives": {"load_balance": 0.3, "router_z": 0.1},
        }
        model = get_peft_model(base(), MoeLoraConfig(**{**defaults, **fields})).train()
        randomise(model)
        return model

    return build


def buffers(model, name):
    return [buffer for key, buffer in model.named_buffers() if name in key]


def test_gradients_under_sft_are_those_of_the_loss_of_the_model(adapt, tmp_path):
    expected = None
    for accumulation, checkpointing in ((1, False), (4, True), (8, False)):
        steps, trainer = fine_tune(adapt(), tmp_path, accumulation, gradient_checkpointing=checkpointing)
        expected = expected or plain_train(adapt(), tmp_path, trainer)[0]
        assert_same_steps(steps, expected)
    without, _ = fine_tune(adapt(objectives={}), tmp_path)
    routers = [name for name in expected[0] if "moe_lora_router" in name]
    assert routers
    for name in routers:
        gradient = expected[0][name]
        assert (without[0][name] - gradient).abs().max() > 0.05 * gradient.abs().max(), name


def test_objectives_of_an_adapter_and_of_our_own_model_below_it_both_arrive(adapt, own_model, tmp_path):
    def build():
        model = adapt(own_model, exclude_modules=r".*vision_tower.*")
        for layer in model.get_base_model().moe_layers().values():
            layer.gate.requires_grad_()
        return model

    steps, trainer = fine_tune(build(), tmp_path, 4)
    expected, _ = plain_train(build(), tmp_path, trainer)
    assert any(".gate." in name for name in expected[0])
    assert_same_steps(steps, expected)


def test_values_are_logged_as_with_plain_trainer(adapt, tmp_path):
    logged = []
    steps, trainer = fine_tune(adapt(), tmp_path, 4, callbacks=[LogRouting()])
    _, plain = plain_train(adapt(), tmp_path, trainer, callbacks=[LogRouting()])
    for history in (trainer.state.log_history, plain.state.log_history):
        logged.append([entry for entry in history if "loss" in entry])
    for ours, theirs in zip(*logged, strict=True):
        names = [name for name in theirs if name.startswith(("objective/", "routing/"))]
        assert {"objective/load_balance", "objective/router_z"} < set(names)
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-4)
        # What TRL reports is the language loss.
        objectives = 0.3 * theirs["objective/load_balance"] + 0.1 * theirs["objective/router_z"]
        assert theirs["loss"] - ours["loss"] == pytest.approx(objectives, rel=1e-3)


def test_the_fused_output_gets_every_objective_once(adapt, text):
    model, plain = adapt(), adapt(objectives={})
    for item in (model, plain):
        add_fused_lm_head(item.get_base_model())
    outputs, without = (item(**text, fused_lm_head=True) for item in (model, plain))
    assert torch.equal(outputs.log_probs, without.log_probs)
    assert "_WeighRows" not in type(without.log_probs.grad_fn).__name__
    reference = adapt()(**text)
    torch.testing.assert_close(outputs.loss, reference.loss)
    assert outputs.loss > without.loss + 0.1
    counted = buffers(model, "accumulated_")
    outputs.loss.backward()
    assert counted and all(count.sum() == 2 * text["attention_mask"].sum() for count in counted)
    with torch.no_grad():
        model(**text, fused_lm_head=True)
    assert all(count.sum() == 2 * text["attention_mask"].sum() for count in counted)


def test_dpo_lowers_the_objectives_and_counts_no_reference(adapt, tmp_path):
    model = adapt(objectives={"load_balance": 0.0, "router_z": 1.0})
    pairs = Dataset.from_list([{"prompt": "w4 w7", "chosen": "w5 w8", "rejected": "w6"}] * 4)
    config = arguments(DPOConfig, tmp_path, 2, num_train_epochs=5, learning_rate=0.1)
    trainer = DPOTrainer(
        model, args=config, train_dataset=pairs, processing_class=tokenizer(), callbacks=[LogRouting()]
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    assert logged[-1]["objective/router_z"] < 0.9 * logged[0]["objective/router_z"]
    tokens = logged[-1]["num_tokens"] - logged[-2]["num_tokens"]
    # TRL keeps the adapter as it was under the name "ref".
    for adapter_name, counted in (("default", 2 * tokens), ("ref", 0)):
        counts = buffers(trainer.model, f"moe_lora_objectives.{adapter_name}.by_name.load_balance.population_")
        assert counts and all(count.sum() == counted for count in counts)


def test_a_call_without_labels_leaves_the_objectives_out_with_a_word(adapt, text):
    model, plain = adapt(), adapt(objectives={})
    labels = text.pop("labels")

    def calls():
        model(**text, labels=labels)
        plain(**text)
        model.generate(**text, max_new_tokens=2, do_sample=False)
        with model.disable_adapter():
            model(**text)
        with torch.no_grad():
            model(**text)
        model.eval()(**text)

    assert warnings_of(calls) == ""
    assert warnings_of(lambda: model.train()(**text)).count("load_balance, router_z enter no loss") == 1
