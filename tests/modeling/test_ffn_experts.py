"""Feed-forward experts under each kind of decision, against plain loops written from the equations."""

from types import SimpleNamespace

import pytest
import torch
from helpers.near import assert_near
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec


BATCH, POSITIONS, HIDDEN, INNER, EXPERTS = 2, 6, 16, 24, 3
KINDS = pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, False), (False, True)])


def build_experts(gated=True, bias=False, hidden_act="silu"):
    torch.manual_seed(0)
    spec = MoELayerSpec(0, HIDDEN, EXPERTS, 2, INNER, hidden_act=hidden_act, gated=gated, bias=bias)
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts


def one_expert(experts, rows, **stacks):
    """Return the equation of one expert, written out, for parameters given by name."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = rows @ stacks[name].T + stacks.get(f"{name}_bias", 0.0)
    if experts.has_gate:
        gate, up = inner[:, :INNER], inner[:, INNER:]
        inner = experts.act_fn(gate) * up
    else:
        inner = experts.act_fn(inner)
    return inner @ stacks["down_proj"].T + stacks.get("down_proj_bias", 0.0)


def expert_parameters(experts, expert):
    return {name: parameter[expert] for name, parameter in experts.named_parameters()}


def gradients_of(experts, inputs, function):
    """Return the output of `function` and the gradients of the inputs and the parameters."""
    experts.zero_grad()
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape))
    return [output, *(tensor.grad for tensor in inputs), *(parameter.grad for parameter in experts.parameters())]


@KINDS
def test_assigned_experts_follow_the_equation(gated, bias):
    experts = build_experts(gated, bias)
    index = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 0], [2, 1]])  # 3 marks an empty slot
    weight = torch.rand(5, 2).masked_fill(index == EXPERTS, 0.0)

    def reference(hidden_states, weight):
        rows = []
        for token in range(5):
            row = torch.zeros(HIDDEN)
            for slot, expert in enumerate(index[token].tolist()):
                if expert < EXPERTS:
                    parameters = expert_parameters(experts, expert)
                    row = row + weight[token, slot] * one_expert(experts, hidden_states[token, None], **parameters)[0]
            rows.append(row)
        return torch.stack(rows)

    inputs = [torch.randn(5, HIDDEN), weight]
    results = gradients_of(experts, inputs, lambda x, w: experts(x, ExpertAssignment(index, w, EXPERTS)))
    torch.testing.assert_close(results, gradients_of(experts, inputs, reference), rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("slots_per_expert", [1, 2])
def test_mixed_slots_stay_within_their_sequence_and_follow_the_equation(gated, bias, slots_per_expert):
    experts = build_experts(gated, bias)
    slots = EXPERTS * slots_per_expert
    inputs = [
        torch.randn(BATCH * POSITIONS, HIDDEN),
        torch.randn(BATCH, POSITIONS, slots).softmax(dim=1),
        torch.randn(BATCH, POSITIONS, slots).softmax(dim=2),
    ]

    def reference(hidden_states, dispatch, combine):
        sequences = []
        for tokens, take, give in zip(hidden_states.view(BATCH, POSITIONS, -1), dispatch, combine, strict=True):
            output = torch.zeros(POSITIONS, HIDDEN)
            for slot in range(slots):
                parameters = expert_parameters(experts, slot // slots_per_expert)
                output = output + give[:, slot, None] * one_expert(experts, take[None, :, slot] @ tokens, **parameters)
            sequences.append(output)
        return torch.cat(sequences)

    results = gradients_of(experts, inputs, lambda x, *weights: experts(x, SlotMixture(*weights, EXPERTS)))
    torch.testing.assert_close(results, gradients_of(experts, inputs, reference), rtol=1e-4, atol=1e-4)


@KINDS
def test_merged_experts_follow_the_equation(gated, bias):
    experts = build_experts(gated, bias)
    group = torch.tensor([0, 1, 1, 0, 3, 1, 0])  # nothing is in group 2

    def reference(hidden_states, expert_weight):
        rows = []
        for row, g in zip(hidden_states, group.tolist(), strict=True):
            merged = {
                name: sum(share * matrix for share, matrix in zip(expert_weight[g], parameter, strict=True))
                for name, parameter in experts.named_parameters()
            }
            rows.append(one_expert(experts, row[None], **merged))
        return torch.cat(rows)

    inputs = [torch.randn(7, HIDDEN), torch.randn(4, EXPERTS).softmax(dim=-1)]
    results = gradients_of(experts, inputs, lambda x, w: experts(x, ParameterMixture(w, group, EXPERTS)))
    torch.testing.assert_close(results, gradients_of(experts, inputs, reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["assignment", "slots", "parameters"])
def test_low_precision_keeps_the_dtype_of_the_tokens_and_the_value(kind, autocast):
    experts = build_experts(bias=True)
    hidden_states = torch.randn(BATCH * POSITIONS, HIDDEN)
    decision = {
        "assignment": ExpertAssignment(
            torch.randint(0, EXPERTS + 1, (BATCH * POSITIONS, 2)), torch.rand(BATCH * POSITIONS, 2), EXPERTS
        ),
        "slots": SlotMixture(
            torch.randn(BATCH, POSITIONS, EXPERTS).softmax(1), torch.rand(BATCH, POSITIONS, EXPERTS), EXPERTS
        ),
        "parameters": ParameterMixture(
            torch.rand(BATCH, EXPERTS), torch.arange(BATCH).repeat_interleave(POSITIONS), EXPERTS
        ),
    }[kind]
    expected = experts(hidden_states, decision)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = experts(hidden_states, decision)
        assert not torch.equal(output, expected)
    else:
        output = experts.bfloat16()(hidden_states.bfloat16(), decision)
    assert output.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert (output.float() - expected).norm() < 0.02 * expected.norm()


def test_one_expert_is_the_dense_feed_forward():
    spec = MoELayerSpec(0, HIDDEN, 1, 1, INNER, hidden_act="gelu")
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    experts.initialize(0.2)
    hidden_states = torch.randn(5, HIDDEN)
    decision = ExpertAssignment(torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), 1)
    gate, up = F.linear(hidden_states, experts.gate_up_proj[0]).chunk(2, dim=-1)
    dense = F.linear(ACT2FN["gelu"](gate) * up, experts.down_proj[0])
    torch.testing.assert_close(experts(hidden_states, decision), dense)


@KINDS
def test_parameters_are_stacked_under_the_names_of_transformers(gated, bias):
    experts = build_experts(gated, bias)
    name, inner = ("gate_up_proj", 2 * INNER) if gated else ("up_proj", INNER)
    shapes = {name: (EXPERTS, inner, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INNER)}
    if bias:
        shapes |= {f"{name}_bias": (EXPERTS, inner), "down_proj_bias": (EXPERTS, HIDDEN)}
    assert {key: tuple(parameter.shape) for key, parameter in experts.named_parameters()} == shapes


def test_initialize_gives_every_expert_its_own_weights_and_zero_biases():
    experts = build_experts(bias=True)
    experts.initialize(0.05)
    for parameter in (experts.gate_up_proj, experts.down_proj):
        assert 0.04 < parameter.std() < 0.06
        assert not torch.equal(parameter[0], parameter[1])
    assert not experts.gate_up_proj_bias.any() and not experts.down_proj_bias.any()


@pytest.mark.parametrize("gated", [True, False])
def test_experts_split_by_width_add_up_to_whole_ones(gated):
    whole = build_experts(gated, bias=True)
    index = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 0], [2, 1]])  # 3 marks an empty slot
    weight = torch.rand(5, 2).masked_fill(index == EXPERTS, 0.0)
    hidden_states = torch.randn(5, HIDDEN)

    total = torch.zeros_like(hidden_states)
    for half in range(2):
        # As tensor parallelism splits them: every process holds the last bias whole.
        own = build_experts(gated, bias=True)
        for name, parameter in own.named_parameters():
            if name == "down_proj":
                parameter.data = parameter.data.chunk(2, dim=-1)[half]
            elif name != "down_proj_bias":
                halves = [part.chunk(2, dim=1)[half] for part in parameter.data.chunk(2 if gated else 1, dim=1)]
                parameter.data = torch.cat(halves, dim=1)
        total += own(hidden_states, index, weight)
    assert_near(total, whole(hidden_states, index, weight))


@pytest.mark.parametrize(
    ("gated", "options", "message"),
    [
        (False, {"limit": 7.0}, "Layer 0: limit, shared_limit and alpha are of experts with a gate"),
        (True, {"alpha": 1.7, "dropout": 0.1}, "dropout acts behind the activation"),
    ],
)
def test_a_clamp_that_has_no_place_is_refused(gated, options, message):
    with pytest.raises(ValueError, match=message):
        FfnExperts(
            SimpleNamespace(_experts_implementation="ragged"),
            MoELayerSpec(0, HIDDEN, EXPERTS, 2, INNER, gated=gated),
            **options,
        )
