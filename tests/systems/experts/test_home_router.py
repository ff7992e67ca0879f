"""The gates of HoME: masks of modalities or tasks, and a gate of one's own."""

from dataclasses import replace

import pytest
import torch
from helpers.router_cases import make_context, make_experts, make_hidden, make_router, make_spec

from hf_moe.modeling.overrides import RoutingOverrides


SEEN = [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 6]]  # 2, 3 are of gate 0, 5 of gate 1, 6 of gate 2; nobody sees 7


@pytest.mark.parametrize("conditioning", ["modality", "condition"])
@pytest.mark.parametrize("self_gate", [False, True])
def test_gates_see_their_experts_and_add_their_own(conditioning, self_gate):
    options = {"experts_of": SEEN, "self_gate": self_gate, "conditioning": conditioning, "num_conditions": 3}
    router = make_router("home", {**options, "modalities": ["text", "image", "audio"]})
    context = make_context(rows=4, condition_ids={"task": torch.tensor([2, 0, 1, 3])})
    context.modality_ids[:, 8] = 3
    hidden = make_hidden(context)
    gates = torch.tensor([0, 1, 1, 2])[context.modality_ids.flatten()]
    gates = gates if conditioning == "modality" else context.condition("task", "cpu")
    decision = router(hidden, context)
    for gate, x, found in zip(gates.tolist(), hidden, decision.weight_table(), strict=True):
        expected = torch.zeros(8)
        if gate < 3:
            best = (router.weight[gate] @ x)[SEEN[gate]].topk(2)
            expected[torch.tensor(SEEN[gate])[best.indices]] = best.values.softmax(-1)
            own = [[2, 3], [5], [6]][gate]
            if self_gate:
                scores = router.self_weight[own] @ x
                expected[own] += scores.softmax(-1) if len(own) > 1 else scores.sigmoid()
        torch.testing.assert_close(found, expected)
    counted = replace(decision, chosen_index=None).slot_table(gates * 0, 1, gates < 3)
    assert (decision.slot_table(gates * 0, 1, gates < 3)[0, :8].sum() < counted[0, :8].sum()) == self_gate
    assert decision.slot_table(gates * 0, 1, gates == 3)[0, :8].sum() == 0
    assert router.most_experts_per_tok() == (4 if self_gate else 2) == decision.expert_index.shape[1]


@pytest.mark.parametrize("self_gate", [False, True])
def test_disabled_experts_of_a_gate_leave_finite_weights(self_gate):
    router, context = make_router("home", {"experts_of": SEEN[:2], "self_gate": self_gate}), make_context()
    context.overrides = RoutingOverrides(disabled_experts={1: [0, 1, 2, 3]})
    table = router(make_hidden(context), context).weight_table()
    assert table.isfinite().all() and not table[:, :4].any() and (table.sum(-1) > 0.4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_of": [[0, 1]]}, "for each of 2 gates"),
        ({"experts_of": [[0, 1], [2, 2]]}, "at least num_experts_per_tok=2"),
        ({"experts_of": [[0, 1], [2, 8]]}, r"in \[0, 8\)"),
        ({"self_gate": True}, "needs an expert that one gate alone sees"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_router("home", options)


def gradient_of_own_experts(self_gate: bool) -> float:
    """Return the gradient norm of the two experts that images alone see, where one token of twenty is an image."""
    torch.manual_seed(0)
    experts = make_experts(make_spec(), std=0.3)
    options = {"experts_of": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]], "self_gate": self_gate}
    router, context = make_router("home", options), make_context(rows=20, positions=20)
    context.modality_ids = (torch.arange(400) % 20 == 0).long().view(20, 20)
    torch.manual_seed(1)
    hidden, target = torch.randn(2, 400, 32)
    (experts(hidden, router(hidden, context)) - target).square().mean().backward()
    return torch.cat([experts.down_proj.grad[6:], experts.gate_up_proj.grad[6:].mT], -1).norm().item()


def test_experts_of_a_rare_modality_learn_more_with_a_self_gate():
    assert gradient_of_own_experts(True) > 1.2 * gradient_of_own_experts(False)
