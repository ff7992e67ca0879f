"""HoME: experts of one scale, masks of modalities or tasks, a view of the features, and a gate of one's own."""

from dataclasses import replace

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.router_cases import EAGER, make_context, make_hidden, make_router, make_spec

from hf_moe.construction.in_place import from_host
from hf_moe.modeling.decisions import ExpertAssignment, SlotMixture
from hf_moe.modeling.experts.home import HomeExperts
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.overrides import RoutingOverrides


SEEN = [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 6]]  # 2, 3 are of gate 0, 5 of gate 1, 6 of gate 2; nobody sees 7


def make_experts(**options) -> HomeExperts:
    torch.manual_seed(0)
    experts = HomeExperts(EAGER, make_spec(), **options)
    initialize_mechanisms(experts, 0.3)
    return experts


def chosen(tokens: int = 200, slots: int = 2) -> ExpertAssignment:
    index = torch.stack([torch.randperm(9)[:slots] for _ in range(tokens)])  # 8 is empty
    return ExpertAssignment(index, torch.rand(tokens, slots).masked_fill(index == 8, 0.0), 8)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("rank", [0, 3])
def test_experts_follow_their_formula(norm, rank):
    experts, decision, hidden = make_experts(expert_norm=norm, feature_gate_rank=rank), chosen(), torch.randn(200, 32)
    for parameter in experts.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    expected = torch.zeros(200, 32)
    for token, x in enumerate(hidden):
        index, weight = decision.expert_index[token], decision.expert_weight[token]
        for e, w in zip(index[index < 8], weight[index < 8], strict=True):
            read = x if rank == 0 else x * 2 * (experts.feature_gate_B[e] @ (experts.feature_gate_A[e] @ x)).sigmoid()
            gate, up = (experts.ffn.gate_up_proj[e] @ read).chunk(2)
            u = experts.ffn.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            u = u if norm == "none" else experts.norm_weight[e] * u / (u.square().mean() + 1e-6).sqrt()
            expected[token] += w * u
    torch.testing.assert_close(experts(hidden, decision), expected, atol=1e-5, rtol=1e-5)
    once = ExpertAssignment(torch.arange(8)[:, None], torch.ones(8, 1), 8)
    mixture = SlotMixture(torch.eye(8)[None], torch.eye(8)[None], 8)
    torch.testing.assert_close(experts(hidden[:8], mixture), experts(hidden[:8], once), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("norm", "least", "most"), [("none", 5.0, 100.1), ("rms", 0.9, 1.1)])
def test_a_loud_expert_outweighs_the_others_without_a_norm(norm, least, most):
    experts, hidden, shares = make_experts(expert_norm=norm), torch.randn(64, 32), []
    for scale in (1.0, 10.0):
        experts.ffn.down_proj[3] *= scale
        index = torch.arange(8).repeat_interleave(64)[:, None]
        output = experts(hidden.repeat(8, 1), ExpertAssignment(index, torch.ones(512, 1), 8))
        energy = output.view(8, -1).square().sum(-1)
        shares.append(energy[3] / energy.sum())
    assert least < shares[1] / shares[0] < most


@torch.no_grad()
def test_a_hosted_model_starts_as_its_host_with_feature_gates():
    host, ids = small_host("qwen3"), torch.arange(5, 25)[None]
    expected = host(input_ids=ids).logits
    experts = {"name": "home", "expert_norm": "none", "feature_gate_rank": 4}
    router = {"name": "home", "experts_of": [[0, 1, 2], [0, 1, 3]]}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "router": router, "experts": experts}
    model = from_host(host, moe_config=moe)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    normed = from_host(small_host("qwen3"), moe_config={**moe, "experts": "home"})(input_ids=ids).logits
    assert normed.isfinite().all() and (normed - expected).abs().max() > 1e-3


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
    experts = make_experts()
    options = {"experts_of": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]], "self_gate": self_gate}
    router, context = make_router("home", options), make_context(rows=20, positions=20)
    context.modality_ids = (torch.arange(400) % 20 == 0).long().view(20, 20)
    torch.manual_seed(1)
    hidden, target = torch.randn(2, 400, 32)
    (experts(hidden, router(hidden, context)) - target).square().mean().backward()
    return torch.cat([experts.ffn.down_proj.grad[6:], experts.ffn.gate_up_proj.grad[6:].mT], -1).norm().item()


def test_experts_of_a_rare_modality_learn_more_with_a_self_gate():
    assert gradient_of_own_experts(True) > 1.2 * gradient_of_own_experts(False)
