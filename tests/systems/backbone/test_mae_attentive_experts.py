"""Attentive experts: each leaves a head out, a gate on the tokens so far mixes them, and both learn in turns."""

import pytest
import torch
from helpers.near import assert_near
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_moe import from_system
from hf_moe.modeling.attention.mae_attentive_experts import ScaledHeads
from hf_moe.training.alternating_gates import AlternatingGates


HEADS, LENGTH = 4, 14
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def make_host():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=24, initializer_range=0.15, pad_token_id=0)).eval()


def make_model(even=True, **attention):
    attention = {"name": "mae_attentive_experts", **attention}
    model = from_system(
        "mae_attentive_experts",
        host=make_host(),
        moe_config={"router": {"gate_hidden_size": 16, "zero_init": even}, "attention": attention},
    )
    return model.train()


def make_rows(generator, rows=32):
    """Return rows in which a token is the one two or five places before, as the first token of the row says."""
    ids = torch.randint(4, 20, (rows, LENGTH), generator=generator)
    kind = torch.arange(rows) % 2
    ids[:, 0] = 2 + kind
    for place in range(6, LENGTH):
        ids[:, place] = torch.where(kind == 0, ids[:, place - 2], ids[:, place - 5])
    labels = ids.masked_fill(torch.arange(LENGTH) < 6, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, kind


def scales_of(model, rows):
    """Return the scales of every layer, (layers, B, S, h), and the loss."""
    found, hooks = [], []
    for module in model.modules():
        if isinstance(module, ScaledHeads):

            def keep(projection, scaled, module=module):
                found.append(scaled[0].unflatten(-1, (HEADS, -1)).norm(dim=-1) / module.seen)

            def see(module, states):
                module.seen = states[0].unflatten(-1, (HEADS, -1)).norm(dim=-1)

            hooks += [module.register_forward_pre_hook(see), module.projection.register_forward_pre_hook(keep)]
    loss = model(**rows).loss
    for hook in hooks:
        hook.remove()
    return torch.stack(found), loss


@torch.no_grad()
def test_an_even_gate_is_plain_attention():
    rows, _ = make_rows(torch.Generator().manual_seed(1))
    for dropped in (1, 2):
        assert_near(make_model(dropped_heads=dropped).eval()(**rows).logits, make_host()(**rows).logits, 1e-6)


@pytest.mark.parametrize("dropped, experts", [(1, 4), (2, 6), (3, 4)])
@torch.no_grad()
def test_scales_average_to_1(dropped, experts):
    model = make_model(even=False, dropped_heads=dropped)
    rows, _ = make_rows(torch.Generator().manual_seed(1))
    for parameter in (p for name, p in model.named_parameters() if "outer" in name):
        parameter.normal_()
    scales, _ = scales_of(model, rows)
    decision = model(**rows, output_routing=True).routing.decisions["0.attention"]
    assert decision.num_experts == experts
    assert_near(scales.mean(-1), torch.ones(2, 32, LENGTH), 1e-5)
    assert scales.std(-1).mean() > 0.05 and scales.max() < HEADS / (HEADS - dropped) + 1e-4
    if dropped == 1:
        expected = HEADS / (HEADS - 1) * (1 - decision.weight_table().view(32, LENGTH, HEADS))
        assert_near(scales[0], expected, 1e-5)


def test_a_step_without_gates_runs_one_expert_for_each_row():
    model, (rows, _) = make_model(), make_rows(torch.Generator().manual_seed(1))
    rows["attention_mask"][0, :3] = 0
    turns = AlternatingGates(model)
    turns.train(gates=False)
    scales, loss = scales_of(model, rows)
    loss.backward()
    assert all(p.grad is None for p in turns.gates) and all(p.grad is not None for p in turns.others)
    left_out = (scales[:, :, 3:] == 0).all(2)  # (layers, B, h)
    assert (left_out.sum(-1) == 1).all() and left_out.any(1).all(), "one head in a row, and not always the same"
    assert (left_out[0] != left_out[1]).any(), "every layer draws for itself"
    assert_near(scales[:, :, 3:].sum(-1), torch.full((2, 32, LENGTH - 3), float(HEADS)), 1e-5)
    model.zero_grad()
    turns.train(gates=True)
    model(**rows).loss.backward()
    assert all(p.grad is not None for p in turns.gates) and all(p.grad is None for p in turns.others)


@torch.no_grad()
def test_draws_follow_the_gate_and_end_with_training():
    model, (rows, _) = make_model(), make_rows(torch.Generator().manual_seed(1), rows=400)
    for layer in model.model.layers:
        layer.self_attn.q_proj.gate.outer_bias.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    AlternatingGates(model).train(gates=False)
    drawn = (scales_of(model, rows)[0][..., -1, :] == 0).float().mean((0, 1))
    assert_near(drawn, torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.07)
    assert (scales_of(model.eval(), rows)[0] > 0).all()


@torch.no_grad()
def test_the_most_likely_expert_runs_alone():
    model, (rows, _) = make_model(even=False, inference="argmax").eval(), make_rows(torch.Generator().manual_seed(1))
    scales, _ = scales_of(model, rows)
    assert ((scales == 0).sum(-1) == 1).all() and (scales_of(model.train(), rows)[0] > 0).all()


def test_epochs_take_turns(tmp_path):
    model, (rows, _) = make_model(), make_rows(torch.Generator().manual_seed(1), rows=4)
    turns, moved = AlternatingGates(model, gate_epoch_every=3), []

    class Watch(AlternatingGates):
        def on_epoch_begin(self, *args, **kwargs):
            self.before = [[p.detach().clone() for p in part] for part in (self.gates, self.others)]

        def on_epoch_end(self, *args, **kwargs):
            parts = zip(self.before, (self.gates, self.others), strict=True)
            moved.append([any(map(torch.Tensor.any, (a != b for a, b in zip(*part, strict=True)))) for part in parts])

        def on_train_end(self, *args, **kwargs):
            pass

    data = [{name: value[row] for name, value in rows.items()} for row in range(4)]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=6, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[turns, Watch(model)]).train()
    assert moved == [[False, True], [False, True], [True, False]] * 2
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_types_of_rows_use_other_heads():
    model = make_model()
    turns, generator = AlternatingGates(model), torch.Generator().manual_seed(0)
    groups = [{"params": turns.gates, "lr": 5e-2}, {"params": turns.others, "lr": 5e-3}]
    optimizer = torch.optim.Adam(groups)
    for step in range(150):
        turns.train(gates=step % 10 >= 8)
        optimizer.zero_grad()
        loss = model(**make_rows(generator)[0]).loss
        loss.backward()
        optimizer.step()
    rows, kind = make_rows(torch.Generator().manual_seed(9), rows=64)
    with torch.no_grad():
        decisions = model.eval()(**rows, output_routing=True).routing.decisions.values()
    gates = torch.stack([item.weight_table().view(64, LENGTH, HEADS)[:, 6:].mean(1) for item in decisions])
    apart = (gates[:, kind == 0].mean(1) - gates[:, kind == 1].mean(1)).abs().sum(-1) / 2  # (layers,)
    assert apart.max() > 0.2, apart


def test_a_layer_keeps_a_head():
    with pytest.raises(ValueError, match="at least one head must stay"):
        make_model(dropped_heads=HEADS)


def test_a_row_draws_from_its_last_token():
    queries = make_model().model.layers[0].self_attn.q_proj
    gates = torch.eye(HEADS)[torch.tensor([0, 0, 3, 0, 0, 1])]  # of two rows
    assert queries._drawn(gates, torch.zeros(2, 3, 32)).tolist() == [3, 3, 3, 1, 1, 1]
