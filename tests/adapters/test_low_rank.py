"""All compute forms give what a loop over the experts gives, and the right one is taken."""

import pytest
import torch
from helpers.near import assert_near

from hf_moe.adapters import low_rank
from hf_moe.adapters.low_rank import SharedAssignment, add_experts
from hf_moe.adapters.stacks import Weights
from hf_moe.modeling import dispatch


# The bytes up to which all experts are computed for every token.
FORMS = {"dense": 1 << 30, "by rows": 0}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setattr(low_rank, "MAX_DENSE_BYTES", FORMS[request.param])
    return request.param


def mix(result, inputs, lora_a, lora_b, weight, index, experts, scaling=1.0):
    decision = SharedAssignment(index, weight, experts)
    return add_experts(result, inputs, Weights(lora_a, lora_b, scaling=scaling), decision)


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
    output = mix(*leaves, index, experts)
    expected = loop(*leaves, index, experts)
    assert_near(output, expected, 1e-5)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    reference = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    for gradient, wanted in zip(gradients, reference, strict=True):
        assert_near(gradient, wanted, 1e-5)


def test_the_scaling_multiplies_what_the_experts_add(form):
    (result, *others), index, experts = case()
    expected = result + 2.5 * (loop(result, *others, index, experts) - result)
    assert_near(mix(result, *others, index, experts, scaling=2.5), expected, 1e-5)


def test_in_bfloat16_a_form_is_as_close_to_the_loop_as_the_dtype_allows(form):
    leaves, index, experts = case(tokens=60, experts=9, rank=8, width=32)
    expected = loop(*leaves, index, experts)
    reference = torch.autograd.grad(expected.square().sum(), leaves)
    half = [leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in leaves]
    output = mix(*half, index, experts)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().square().sum(), half)
    for found, wanted in zip([output, *gradients], [expected, *reference], strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_under_autocast_a_form_computes_in_bfloat16_and_keeps_the_dtype_of_the_result(form, monkeypatch):
    leaves, index, experts = case(width=16, out=8, rank=8)
    seen = []
    place = (low_rank.F, "linear") if form == "dense" else (dispatch, "grouped_linear")
    product = getattr(*place)

    def spy(*args, **kwargs):
        output = product(*args, **kwargs)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(*place, spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mix(*leaves, index, experts)
    assert set(seen) == {torch.bfloat16} and output.dtype == torch.float32
    torch.testing.assert_close(output, loop(*leaves, index, experts), atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "experts, rank, slots, dense", [(8, 8, 2, True), (9, 8, 2, False), (64, 8, 2, False), (32, 8, 32, True)]
)
def test_the_form_follows_the_total_rank(monkeypatch, experts, rank, slots, dense):
    sorted_by = []
    monkeypatch.setattr(low_rank, "Dispatch", lambda *args: sorted_by.append(args) or dispatch.Dispatch(*args))
    leaves, index, experts = case(experts=experts, rank=rank, slots=slots)
    mix(*leaves, index, experts)
    assert len(sorted_by) == (not dense)
    mix(*[leaf.to(torch.bfloat16) for leaf in leaves], index, experts)
    assert len(sorted_by) == 2 * (not dense) - (not dense and experts * rank <= 128)


def test_targets_with_the_same_input_gather_it_once():
    (_, inputs, _, _, weight), index, experts = case()
    slots = SharedAssignment(index, weight, experts)
    first = slots.rows(inputs, torch.float32)
    assert slots.rows(inputs, torch.float32) is first
    torch.testing.assert_close(slots.rows(inputs * 2, torch.float32), 2 * first)
