"""Training modes: checkpointing, two forwards in one backward, compilation, wrapped blocks, adapters."""

import logging

import pytest
import torch
from helpers.near import assert_near


OBJECTIVES = {"load_balance": 0.1, "router_z": 0.01}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    # pytest listens to every logger, and writing the compiler's trace takes longer than compiling.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    yield
    torch._dynamo.reset()


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return found


def forget_statistics(model):
    for statistic in model.objectives.buffers():
        statistic.zero_()


def assert_equal_gradients(actual, expected, share=1e-6):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, share)
    assert max(gradient.abs().max() for name, gradient in expected.items() if ".gate." in name) > 1e-4


@pytest.mark.parametrize("host", ["llama", "gemma2", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, training_batch, host):
    model = tiny_model(
        host, {"head_dim": 8} if host == "gemma2" else {}, moe_config={"objectives": OBJECTIVES}
    ).train()
    model(**training_batch).loss.backward()
    expected = gradients(model)
    forget_statistics(model)
    model.gradient_checkpointing_enable()
    runs = []
    model.moe_layers()[1].experts.register_forward_pre_hook(lambda *_: runs.append(1))
    model(**training_batch).loss.backward()
    assert len(runs) == 2, "the layer ran again in the backward pass"
    assert_equal_gradients(gradients(model), expected)


def test_reentrant_checkpointing_is_refused_with_objectives_only(tiny_model, training_batch):
    with pytest.raises(ValueError, match=r"use_reentrant=True cuts the gradient .*load_balance, router_z"):
        tiny_model(moe_config={"objectives": OBJECTIVES}).gradient_checkpointing_enable({"use_reentrant": True})
    model = tiny_model().train()
    model(**training_batch).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**training_batch).loss.backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_in_one_backward_keep_their_own_routing(tiny_model, make_batch, checkpointing):
    model = tiny_model(moe_config={"router": {"name": "moiie"}, "num_experts": 4}).train()
    first, second = make_batch([(1, 6, 0), (0, 12, 1)]), make_batch([(2, 3, 2)])
    expected = None
    for batch in (first, second):
        model(**batch).logits.square().mean().backward()
        own = gradients(model)
        expected = own if expected is None else {name: expected[name] + own[name] for name in own}
    if checkpointing:
        model.gradient_checkpointing_enable()
    losses = [model(**batch).logits.square().mean() for batch in (first, second)]
    sum(losses).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_model_compiles_as_one_graph_with_grouped_mm(tiny_model, training_batch, training):
    model = tiny_model(host_fields={"num_hidden_layers": 2}, moe_config={"objectives": OBJECTIVES}).train(training)
    model.set_experts_implementation("grouped_mm")
    expected = model(**training_batch)
    if training:
        expected.loss.backward()
        expected_gradients = gradients(model)
        forget_statistics(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(**training_batch)
    assert_near(actual.logits, expected.logits, 1e-5)
    assert (actual.loss - expected.loss).abs() < 1e-6
    if training:
        actual.loss.backward()
        assert_equal_gradients(gradients(model), expected_gradients)


def test_ragged_breaks_the_graph_at_the_dispatch_only(tiny_model, make_batch):
    model = tiny_model(host_fields={"num_hidden_layers": 1}, tower=False, moe_config={"layers": "all"})
    batch = make_batch([(0, 6, 0)])
    batch.pop("pixel_values", None)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = model(**batch).logits
        assert_near(torch.compile(model, backend="aot_eager")(**batch).logits, expected, 1e-5)
    reasons = list(torch._dynamo.utils.counters["graph_break"])
    assert reasons
    assert all("ragged_experts_forward" in reason for reason in reasons), reasons


def test_compile_and_checkpointing_together(tiny_model, training_batch):
    model = tiny_model(host_fields={"num_hidden_layers": 2}, moe_config={"objectives": OBJECTIVES}).train()
    model.set_experts_implementation("grouped_mm")
    model(**training_batch).loss.backward()
    expected = gradients(model)
    forget_statistics(model)
    model.gradient_checkpointing_enable()
    # The decision is written inside the region that is run again.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(**training_batch, use_cache=False).loss.backward()
    assert_equal_gradients(gradients(model), expected)


def test_a_moe_block_compiles_by_itself(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**batch)
        for layer in model.model.language_model.layers[1:]:
            layer.mlp.compile(backend="aot_eager")
        outputs = model(**batch, output_routing=True)
    assert_near(outputs.logits, expected.logits, 1e-5)
    padding = batch["attention_mask"].flatten() == 0
    assert (outputs.routing.decisions[1].expert_index[padding] == 4).all(), "the block saw the mask"


def test_statistics_move_once_per_optimizer_step(tiny_model, training_batch):
    model = tiny_model(moe_config={"objectives": {"load_balance": 0.1}, "router": {"name": "deepseek_v3"}}).train()
    population = lambda: model.objectives.by_name["load_balance"].get_buffer("population_1").sum().item()  # noqa: E731
    real = int(training_batch["attention_mask"].sum())
    for step in range(3):
        for micro_batch in range(2):
            model(**training_batch).loss.backward()
            assert population() == (0 if step == 0 else 2 * 2 * real), (step, micro_batch)
        model.zero_grad()
    bias = model.moe_layers()[1].gate.e_score_correction_bias
    assert bias.abs().max() == pytest.approx(2 * model.moe_layers()[1].gate.bias_update_rate)


def test_evaluation_and_generation_leave_the_statistics_alone(tiny_model, training_batch):
    model = tiny_model(moe_config={"objectives": OBJECTIVES, "router": {"name": "deepseek_v3"}})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(**training_batch)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
