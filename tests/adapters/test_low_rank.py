"""All compute forms give what a loop over the experts gives, and the right one is taken."""

import pytest
import torch
from helpers.near import assert_near

from hf_moe.adapters import low_rank
from hf_moe.adapters.low_rank import ExpertSlots, add_experts, bucketed, grouped, masked_dense
from hf_moe.modeling.decisions import ExpertAssignment


FORMS = [masked_dense, grouped, bucketed]


def case(tokens=11, width=12, out=7, experts=4, rank=3, slots=2, empty=0.3, favourite=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    score = torch.rand(tokens, experts, generator=generator)
    score[:, 0] += favourite
    index = score.topk(slots).indices
    weight = draw(tokens, slots).softmax(-1)
    hole = torch.rand(tokens, slots, generator=generator) < empty
    index, weight = index.masked_fill(hole, experts), weight.masked_fill(hole, 0.0)
    leaves = [draw(tokens, out), draw(tokens, width), draw(experts, rank, width), draw(experts, out, rank), weight]
    return [leaf.requires_grad_() for leaf in leaves], index, experts


def loop(result, inputs, lora_a, lora_b, weight, index, experts):
    rows = []
    for token in range(len(inputs)):
        row = result[token]
        for slot, expert in enumerate(index[token].tolist()):
            if expert < experts:
                row = row + weight[token, slot] * (lora_b[expert] @ (lora_a[expert] @ inputs[token]))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rank": 1, "width": 13, "out": 5},
        {"slots": 1, "empty": 0.0},
        {"empty": 1.0},
        {"experts": 1, "slots": 1},
        {"tokens": 1, "experts": 70, "empty": 0.0},  # most experts have no token
        {"tokens": 60, "experts": 9, "slots": 1, "favourite": 1.0},  # one expert has all
        {"tokens": 60, "experts": 40, "favourite": 0.9},
    ],
)
def test_a_form_equals_the_loop_in_output_and_gradients(form, sizes):
    leaves, index, experts = case(**sizes)
    result, inputs, lora_a, lora_b, weight = leaves
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    output = form(result, inputs, lora_a, lora_b, slots)
    expected = loop(*leaves, index, experts)
    assert_near(output, expected, 1e-5)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    reference = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    for gradient, wanted in zip(gradients, reference, strict=True):
        assert_near(gradient, wanted, 1e-5)


@pytest.mark.parametrize("trained", [(0, 1), (2,), (3,), (4,)])
def test_buckets_give_their_gradient_alone_to_what_is_trained(trained):
    leaves, index, experts = case()
    leaves = [leaf.detach().requires_grad_(place in trained) for place, leaf in enumerate(leaves)]
    output = bucketed(*leaves[:4], ExpertSlots(ExpertAssignment(index, leaves[4], experts)))
    output.square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    loop(*leaves, index, experts).square().sum().backward()
    for place, (gradient, leaf) in enumerate(zip(found, leaves, strict=True)):
        assert (gradient is not None) == (place in trained)
        if gradient is not None:
            assert_near(gradient, leaf.grad, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16_a_form_is_as_close_to_the_loop_as_the_dtype_allows(form):
    leaves, index, experts = case(tokens=60, experts=9, rank=8, width=32)
    expected = loop(*leaves, index, experts)
    reference = torch.autograd.grad(expected.square().sum(), leaves)
    half = [leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in leaves]
    output = form(*half[:4], ExpertSlots(ExpertAssignment(index, half[4], experts)))
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().square().sum(), half)
    for found, wanted in zip([output, *gradients], [expected, *reference], strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_a_form_computes_in_bfloat16_and_keeps_the_dtype_of_the_result(form, monkeypatch):
    (result, inputs, lora_a, lora_b, weight), index, experts = case(width=16, out=8, rank=8)
    seen = []
    products = {grouped: (low_rank, "grouped_linear"), bucketed: (torch, "bmm"), masked_dense: (low_rank.F, "linear")}
    place = products[form]
    product = getattr(*place)

    def spy(*args, **kwargs):
        output = product(*args, **kwargs)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(*place, spy)
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = form(result, inputs, lora_a, lora_b, slots)
    assert set(seen) == {torch.bfloat16} and output.dtype == torch.float32
    expected = loop(result, inputs, lora_a, lora_b, weight, index, experts)
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "experts, rank, slots, form",
    [(8, 8, 2, "masked_dense"), (9, 8, 2, "bucketed"), (64, 8, 2, "bucketed"), (32, 8, 32, "masked_dense")],
)
def test_on_a_cpu_the_form_follows_the_total_rank(monkeypatch, experts, rank, slots, form):
    taken = []
    for name in ("masked_dense", "grouped", "bucketed"):
        monkeypatch.setattr(low_rank, name, lambda *args, name=name: taken.append(name))
    leaves, index, experts = case(experts=experts, rank=rank, slots=slots)
    add_experts(*leaves[:4], ExpertSlots(ExpertAssignment(index, leaves[4], experts)))
    assert taken == [form]
    taken.clear()
    half = [leaf.to(torch.bfloat16) for leaf in leaves[:4]]
    add_experts(*half, ExpertSlots(ExpertAssignment(index, leaves[4], experts)))
    assert taken == ["masked_dense" if experts * rank <= 128 else form]


@pytest.mark.parametrize("favourite, most", [(0.0, 1.2), (0.5, 1.6), (1.0, 2.6)])
def test_buckets_hold_every_slot_once_in_few_rows_however_uneven_the_loads(favourite, most):
    (_, _, _, _, weight), index, experts = case(tokens=500, experts=64, favourite=favourite)
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    buckets, token, row_weight, filled, starts = slots.bucketed
    filled_slots = int((index < experts).sum())
    assert filled_slots <= len(token) < most * filled_slots
    found = torch.zeros(len(token), dtype=torch.long).index_fill(0, filled, 1)
    assert found.sum() == len(filled) == filled_slots
    assert (row_weight[found == 0] == 0).all()
    gates = torch.zeros(500, experts)
    for bucket, rows in buckets:
        expert = bucket.repeat_interleave((rows.stop - rows.start) // len(bucket))
        gates.index_put_((token[rows], expert), row_weight[rows].detach(), accumulate=True)
    torch.testing.assert_close(gates, slots.gates.detach())
    assert torch.equal(starts.diff(), (index < experts).sum(1)[:-1])


def test_targets_with_the_same_input_gather_it_once():
    (_, inputs, _, _, weight), index, experts = case()
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    first = slots.rows(inputs, torch.float32)
    assert slots.rows(inputs, torch.float32) is first
    torch.testing.assert_close(slots.rows(inputs * 2, torch.float32), 2 * first)
