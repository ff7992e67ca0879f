"""Objectives in a loss that TRL computes outside of the model, from the log-probability of every label."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from helpers.trl_runs import arguments, assert_same_steps, fine_tune, plain_train, rows, tokenizer, warnings_of
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head


OBJECTIVES = {"load_balance": 0.3, "router_z": 0.1}


def test_router_gradients_under_sft_are_those_of_the_loss_of_the_model(tiny_model, tmp_path):
    model = tiny_model(tower=False, moe_config={"objectives": OBJECTIVES})
    expected = None
    for accumulation, checkpointing in ((1, False), (4, True), (8, False)):
        fresh = copy.deepcopy(model)
        steps, trainer = fine_tune(fresh, tmp_path, accumulation, ".gate.", gradient_checkpointing=checkpointing)
        expected = expected or plain_train(copy.deepcopy(model), tmp_path, trainer, ".gate.")[0]
        assert_same_steps(steps, expected)


@pytest.fixture
def fused(tiny_model, text_batch):
    """Build a training model with TRL's head on it, and the inputs that make it return log-probabilities."""

    def build(objectives=OBJECTIVES, **fields):
        model = tiny_model(tower=False, moe_config={"objectives": objectives, **fields}).train()
        add_fused_lm_head(model)
        return model, {**text_batch, "fused_lm_head": True}

    return build


def router_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return model.moe_layers()[1].gate.weight.grad.clone()


def test_log_probabilities_keep_their_values_and_the_loss_gets_the_objectives_once(fused):
    plain, inputs = fused(objectives={})
    without = plain(**inputs)
    model, _ = fused(objectives={"load_balance": {"coef": 0.3, "scope": "sequence"}, "router_z": 0.1})
    outputs = model(**inputs)
    assert torch.equal(outputs.log_probs, without.log_probs)
    reference = model(**{**inputs, "fused_lm_head": False})
    torch.testing.assert_close(outputs.loss, reference.loss)
    expected = router_gradient(model, reference.loss)
    assert (router_gradient(plain, without.loss) - expected).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(router_gradient(model, outputs.loss), expected, atol=1e-6, rtol=1e-5)
    outputs = model(**inputs)
    loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
    torch.testing.assert_close(router_gradient(model, loss), expected, atol=1e-6, rtol=1e-5)


def test_without_objectives_the_log_probabilities_stay_as_they_are_and_routers_still_balance(fused):
    model, inputs = fused(objectives={}, router="deepseek_v3")
    log_probs = model(**inputs).log_probs
    assert "_WeighRows" not in type(log_probs.grad_fn).__name__
    log_probs.sum().backward()
    assert model.moe_layers()[1].gate.load.sum() == 2 * inputs["attention_mask"].sum()


def test_a_preference_loss_balances_the_rows_that_it_pushes_down_as_well(fused):
    def preference(log_probs):
        chosen, rejected = log_probs.sum(-1)
        return -F.logsigmoid(0.1 * (chosen - rejected))

    model, inputs = fused(objectives={"router_z": 0.2})
    plain, _ = fused(objectives={})
    log_probs = model(**inputs).log_probs
    leaf = log_probs.detach().requires_grad_()
    weights = torch.autograd.grad(preference(leaf), leaf)[0].abs().masked_fill(leaf == 0, 0.0).sum(-1)
    difference = router_gradient(model, preference(log_probs)) - router_gradient(
        plain, preference(plain(**inputs).log_probs)
    )
    expected = 0.0
    for row, weight in enumerate(weights):
        one = {name: value[row : row + 1] for name, value in inputs.items() if name != "fused_lm_head"}
        expected = expected + router_gradient(model, weight * model(**one).aux_loss)
    assert weights.min() > 1e-3 and expected.abs().max() > 1e-3
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=1e-4)


def test_statistics_count_what_trains_and_nothing_else(fused):
    model, inputs = fused()
    tokens = 2 * inputs["attention_mask"].sum()

    def counted():
        return model.objectives.by_name["load_balance"].get_buffer("accumulated_1").sum()

    with torch.no_grad():  # a reference, old log-probabilities, metrics
        model(**inputs)
        model(**{**inputs, "fused_lm_head": False})
    assert counted() == 0
    model(**inputs).log_probs.sum().backward()
    assert counted() == tokens
    model(**{**inputs, "fused_lm_head": False}).loss.backward()
    assert counted() == 2 * tokens
    model.eval()(**inputs)
    assert counted() == 2 * tokens


def test_bfloat16_autocast_gives_the_objectives_their_gradient(fused):
    gradients = []
    for objectives in ({}, {"router_z": 0.5}):
        found = []
        for enabled in (False, True):
            model, inputs = fused(objectives=objectives)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                log_probs = model(**inputs).log_probs
            found.append(router_gradient(model, -log_probs.sum() / 12))
        gradients.append(found)
    exact, rounded = (with_z - without for with_z, without in zip(*reversed(gradients), strict=True))
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.95
    assert 0.9 < rounded.norm() / exact.norm() < 1.1


def test_objectives_that_read_outputs_find_them(fused):
    model, inputs = fused(objectives={"expert_contrast": 0.1}, num_experts_per_tok=1)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss, model(**{**inputs, "fused_lm_head": False}).loss)


def test_a_pickled_model_still_hears_of_its_labels(tiny_model, text_batch):
    model = pickle.loads(pickle.dumps(tiny_model(tower=False, moe_config={"objectives": OBJECTIVES}))).train()
    add_fused_lm_head(model)
    outputs = model(**text_batch, fused_lm_head=True)
    assert "_WeighRows" in type(outputs.log_probs.grad_fn).__name__


def test_label_smoothing_leaves_the_objectives_out_with_a_word(tiny_model, tmp_path):
    model = tiny_model(tower=False, moe_config={"objectives": OBJECTIVES})
    balance, steps = model.objectives.by_name["load_balance"], []
    end_step = balance.end_step
    balance.end_step = lambda: steps.append(balance.accumulated_1.sum().item()) or end_step()
    warned = warnings_of(lambda: fine_tune(model, tmp_path, 4, label_smoothing_factor=0.1))
    assert warned.count("load_balance, router_z enter no loss") == 1
    # The statistics of routers and objectives are those of the forwards that train, once each.
    assert sum(steps) == 2 * sum(map(len, rows()["input_ids"]))


def test_no_word_of_labels_where_nothing_trains_or_they_are_there(tiny_model, fused, text_batch):
    model, inputs = fused()
    plain = tiny_model(tower=False).train()  # without objectives

    def calls():
        model(**inputs)
        plain(input_ids=text_batch["input_ids"])
        model.generate(text_batch["input_ids"], max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            model(input_ids=text_batch["input_ids"])
        model.eval()(input_ids=text_batch["input_ids"])

    assert warnings_of(calls) == ""
    assert "enter no loss" in warnings_of(lambda: model.train()(input_ids=text_batch["input_ids"]))


def test_dpo_trainer_lowers_the_objectives_and_leaves_the_reference_out(tiny_model, tmp_path):
    model = tiny_model(tower=False, moe_config={"objectives": {"router_z": 1.0}, "router": {"name": "deepseek_v3"}})
    reference = copy.deepcopy(model)
    squares = []

    def keep(module, args, decision):
        squares.append(decision.router_logits.detach().logsumexp(-1).square().mean().item())

    gate = model.moe_layers()[1].gate
    gate.register_forward_hook(keep)
    steps, end_step = [], gate.end_step
    gate.end_step = lambda: steps.append(gate.load.sum().item()) or end_step()
    pairs = Dataset.from_list([{"prompt": "w4 w7", "chosen": "w5 w8", "rejected": "w6"}] * 4)
    config = arguments(DPOConfig, tmp_path, 2, num_train_epochs=5, learning_rate=0.1)
    trainer = DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer())
    trainer.train()
    assert squares[-1] < 0.9 * squares[0]
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    assert steps[-1] == 2 * (tokens[-1] - tokens[-2])
    assert reference.moe_layers()[1].gate.load.sum() == 0
