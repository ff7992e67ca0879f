"""Both compute forms give what a loop over the experts gives, and the right one is taken."""

import pytest
import torch

from hf_moe.adapters import low_rank
from hf_moe.adapters.low_rank import ExpertSlots, add_experts, grouped, masked_dense, padded
from hf_moe.modeling.routing import ExpertAssignment


def case(tokens=11, width=12, out=7, experts=4, rank=3, slots=2, empty=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices
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


@pytest.mark.parametrize("form", [masked_dense, grouped, padded])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rank": 1, "width": 13, "out": 5},
        {"slots": 1, "empty": 0.0},
        {"empty": 1.0},
        {"experts": 1, "slots": 1},
    ],
)
def test_a_form_equals_the_loop_in_output_and_gradients(form, sizes):
    leaves, index, experts = case(**sizes)
    result, inputs, lora_a, lora_b, weight = leaves
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    output = form(result, inputs, lora_a, lora_b, slots)
    expected = loop(*leaves, index, experts)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    reference = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    for gradient, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [masked_dense, grouped, padded])
def test_under_autocast_a_form_computes_in_bfloat16_and_keeps_the_dtype_of_the_result(form, monkeypatch):
    (result, inputs, lora_a, lora_b, weight), index, experts = case(width=16, out=8, rank=8)
    seen = []
    place = {grouped: (low_rank, "grouped_linear"), padded: (torch, "bmm"), masked_dense: (low_rank.F, "linear")}[form]
    product = getattr(*place)

    def spy(*args):
        output = product(*args)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(*place, spy)
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = form(result, inputs, lora_a, lora_b, slots)
    assert seen == [torch.bfloat16] * 2 and output.dtype == torch.float32
    expected = loop(result, inputs, lora_a, lora_b, weight, index, experts)
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "experts, rank, slots, form",
    [(8, 8, 2, "masked_dense"), (9, 8, 2, "padded"), (64, 8, 2, "grouped"), (32, 8, 32, "masked_dense")],
)
def test_the_form_follows_the_total_rank_and_how_even_the_loads_are(monkeypatch, experts, rank, slots, form):
    taken = []
    for name in ("masked_dense", "grouped", "padded"):
        monkeypatch.setattr(low_rank, name, lambda *args, name=name: taken.append(name))
    # Of 11 tokens, two slots for each of 64 experts are very uneven.
    tokens = 400 if form == "padded" else 11
    leaves, index, experts = case(tokens=tokens, experts=experts, rank=rank, slots=slots)
    add_experts(*leaves[:4], ExpertSlots(ExpertAssignment(index, leaves[4], experts)))
    assert taken == [form]
    taken.clear()
    half = [leaf.to(torch.bfloat16) for leaf in leaves[:4]]
    add_experts(*half, ExpertSlots(ExpertAssignment(index, leaves[4], experts)))
    assert taken == ["masked_dense" if experts * rank <= 128 else form]


def test_targets_with_the_same_input_gather_it_once():
    (_, inputs, _, _, weight), index, experts = case()
    slots = ExpertSlots(ExpertAssignment(index, weight, experts))
    for token in (slots.by_expert[0], slots.padded[0]):
        first = slots.rows(inputs, token, torch.float32)
        assert slots.rows(inputs, token, torch.float32) is first
        other = slots.rows(inputs * 2, token, torch.float32)
        torch.testing.assert_close(other, 2 * first)
