"""Every router against its equations, written out token by token."""

import math

import pytest
import torch
from helpers.router_cases import EXPERTS, SLOTS, collapsed, make_context, make_hidden, make_router, make_spec

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.gating import limit_capacity
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


TEXT, IMAGE, AUDIO = 0, 1, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def best(scores: torch.Tensor, count: int) -> list[int]:
    return scores.argsort(descending=True)[:count].tolist()


def shares(scores: torch.Tensor, chosen: list[int], scale: float = 1.0, normalised: bool = True) -> dict[int, float]:
    total = sum(scores[expert].item() for expert in chosen) if normalised else 1.0
    return {expert: scale * scores[expert].item() / total for expert in chosen}


def best_of_groups(scores: torch.Tensor, n_group: int, topk_group: int, counted: int = 2) -> list[int]:
    """Return the two best experts among those of the groups whose `counted` best experts are best."""
    groups = torch.arange(EXPERTS).view(n_group, -1)
    ranked = sorted(groups, key=lambda group: -scores[group].topk(min(counted, len(group))).values.sum().item())
    open_experts = torch.cat(ranked[:topk_group])
    return [open_experts[place].item() for place in best(scores[open_experts], SLOTS)]


def top_k(router: Router, x: torch.Tensor, modality: int) -> dict[int, float]:
    logits = router.weight.double() @ x
    scores = logits.softmax(-1) if router.score_function == "softmax" else logits.sigmoid()
    n_group, topk_group, group_score = router.groups
    bias = 0.0 if router.e_score_correction_bias is None else router.e_score_correction_bias
    slots = router.spec.num_experts_per_tok
    chosen = best_of_groups(scores + bias, n_group, topk_group, 1 if group_score == "best" else 2)[:slots]
    return shares(scores, chosen, router.routed_scaling_factor, router.norm_topk_prob)


def adamoe(router: Router, x: torch.Tensor, modality: int) -> dict[int, float]:
    p = (torch.cat([router.weight, router.null_weight]).double() @ x).softmax(-1)
    return shares(p, [expert for expert in best(p, 4) if expert < EXPERTS])


def ernie45_vl(router: Router, x: torch.Tensor, modality: int) -> dict[int, float]:
    text = router.bank_sizes[0]
    first, end = (text, EXPERTS) if modality == IMAGE else (0, text)
    p = (router.weight.double()[first:end] @ x).softmax(-1)
    chosen = best(p + router.e_score_correction_bias[first:end], SLOTS)
    total = max(sum(p[expert].item() for expert in chosen), router.norm_min)
    return {first + expert: p[expert].item() / total for expert in chosen}


def ming_multi_router(router: Router, x: torch.Tensor, modality: int) -> dict[int, float]:
    gate = {TEXT: 0, IMAGE: 1, AUDIO: 2}[modality]
    logits = router.weight.double()[gate] @ x
    scores = logits.softmax(-1) if router.score_function == "softmax" else logits.sigmoid()
    bias = router.e_score_correction_bias[gate]
    return shares(scores, best_of_groups(scores + bias, *router.groups[:2]), router.routed_scaling_factor)


def moiie(router: Router, x: torch.Tensor, modality: int) -> dict[int, float]:
    vision, inter, _ = router.group_sizes
    gate, first, end = (1, 0, vision + inter) if modality == IMAGE else (0, vision, EXPERTS)
    p = (router.weight.double()[gate, first:end] @ x).softmax(-1)
    return {first + expert: weight for expert, weight in shares(p, best(p, SLOTS)).items()}


CASES = {
    "top_k": (top_k, {"routed_scaling_factor": 1.5}, {}),
    "top_k-plain": (top_k, {"norm_topk_prob": False}, {}),
    "top_k-one_slot": (top_k, {}, {"num_experts_per_tok": 1}),
    "top_k-sigmoid": (top_k, {"score_function": "sigmoid"}, {}),
    "switch_transformer": (top_k, {}, {"num_experts_per_tok": 1}),
    "deepseekmoe": (top_k, {}, {}),
    "deepseekmoe-normalised": (top_k, {"norm_topk_prob": True}, {}),
    "deepseek_v3": (top_k, {"routed_scaling_factor": 2.5}, {}),
    "deepseek_v3-groups": (top_k, {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}, {}),
    "deepseek_v3-best": (top_k, {"n_group": 2, "topk_group": 1, "group_score": "best"}, {}),
    "adamoe": (adamoe, {"num_null_experts": 5, "null_router_init": "normal"}, {"num_experts_per_tok": 4}),
    "ernie45_vl": (ernie45_vl, {}, {}),
    "ernie45_vl-banks": (ernie45_vl, {"norm_min": 0.5}, {"banks": (("text", 5, 16), ("vision", 3, 8))}),
    "ming_multi_router": (ming_multi_router, {"routed_scaling_factor": 1.5}, {}),
    "ming_multi_router-v2": (ming_multi_router, {"gate": "sigmoid_bias", "n_group": 4, "topk_group": 2}, {}),
    "moiie": (moiie, {}, {}),
    "moiie-uneven": (moiie, {"group_fractions": [0.5, 0.375, 0.125]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_routed_by_the_equations(case):
    equations, options, facts = CASES[case]
    router = make_router(case.partition("-")[0], options, make_spec(**facts))
    with torch.no_grad():
        # Far apart, so that no gate, row or bias can stand in for another.
        for name, tensor in router.state_dict().items():
            if name != "load":
                tensor.normal_(std=0.3)
    context = make_context(rows=6)
    if case.startswith("ming"):
        context.modality_ids[:, 8] = AUDIO
    hidden = make_hidden(context)
    decision = router(hidden, context)
    for token, modality in enumerate(context.modality_ids.reshape(-1).tolist()):
        slots = zip(decision.expert_index[token].tolist(), decision.expert_weight[token].tolist(), strict=True)
        found = {expert: weight for expert, weight in slots if expert < EXPERTS}
        assert found == pytest.approx(equations(router, hidden[token].double(), modality), rel=1e-5)


# The capacity of an expert


def within_capacity(assignment: ExpertAssignment, context: RoutingContext, factor: float) -> list[list[int]]:
    """Fill the experts of every row in the order of its tokens and their slots; padding takes no room."""
    rows, positions = context.token_mask.shape
    index = assignment.expert_index.view(rows, positions, -1).clone()
    for row, mask in zip(index, context.token_mask, strict=True):
        room = math.ceil(factor * int(mask.sum()) * row.shape[-1] / EXPERTS)
        left = dict.fromkeys(range(EXPERTS), room)
        for token in mask.nonzero().flatten().tolist():
            for slot, expert in enumerate(row[token].tolist()):
                if expert < EXPERTS:
                    left[expert] -= 1
                    row[token, slot] = EXPERTS if left[expert] < 0 else expert
    return index.view_as(assignment.expert_index).tolist()


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_an_expert_takes_its_factor_of_the_mean_load(slots, factor):
    spec, context = make_spec(num_experts_per_tok=slots), make_context(rows=4, positions=16)
    index = torch.rand(64, EXPERTS).pow(torch.arange(1, EXPERTS + 1)).argsort(descending=True)[:, :slots].clone()
    index[::7, -1] = EXPERTS  # an empty slot takes no room
    assignment = ExpertAssignment(index, torch.rand(64, slots), EXPERTS)
    before, expected = assignment.expert_weight.clone(), torch.tensor(within_capacity(assignment, context, factor))
    limited = limit_capacity(assignment, factor, spec, context)
    real = context.token_mask.reshape(-1)
    assert torch.equal(limited.expert_index[real], expected[real])
    emptied = limited.expert_index != index
    assert emptied[real].any() and torch.equal(limited.chosen_index, index)
    assert torch.equal(limited.expert_weight, before.masked_fill(emptied, 0.0))
    torch.testing.assert_close(limited.signals["dropped"], emptied.float().mean(-1))


@pytest.mark.parametrize("name", ["top_k", "switch_transformer"])
def test_the_capacity_of_a_router_is_a_matter_of_training(name):
    slots = 1 if name == "switch_transformer" else 2
    router = collapsed(make_router(name, {"capacity_factor": 0.5}, make_spec(num_experts_per_tok=slots)))
    context = make_context()
    hidden = make_hidden(context).abs() + 0.1
    assert (router(hidden, context).expert_index < EXPERTS).all()
    assert (router.train()(hidden, context).expert_index == EXPERTS).any()


NAMES = ["adamoe", "deepseek_v3", "deepseekmoe", "ernie45_vl", "ming_multi_router", "moiie", "smora", "top_k"]


@pytest.mark.parametrize("name", [*NAMES, "switch_transformer"])
def test_more_slots_than_candidates_are_refused(name):
    with pytest.raises(ValueError, match="num_experts_per_tok=17"):
        make_router(name, spec=make_spec(num_experts_per_tok=17))
