"""One suite over all routers: what each of them promises to the layer around it."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import EXPERTS, make_context, make_experts, make_hidden, make_router, make_spec, text_context

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.overrides import RoutingOverrides
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing import Router
from hf_moe.modeling.routing_context import RoutingContext


CASES = {
    "top_k": ("top_k", {}, {}),
    "top_k-sigmoid": ("top_k", {"score_function": "sigmoid", "routed_scaling_factor": 2.0}, {}),
    "top_k-one_slot": ("top_k", {}, {"num_experts_per_tok": 1}),
    "top_k-capacity-jitter": ("top_k", {"capacity_factor": 1.0, "jitter_noise": 0.1}, {}),
    "switch_transformer": ("switch_transformer", {}, {"num_experts_per_tok": 1}),
    "deepseekmoe": ("deepseekmoe", {}, {}),
    "deepseek_v3": ("deepseek_v3", {}, {}),
    "deepseek_v3-groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}, {}),
    "adamoe": ("adamoe", {"num_null_experts": 4}, {"num_experts_per_tok": 4}),
    "ernie45_vl": ("ernie45_vl", {}, {}),
    "ernie45_vl-banks": ("ernie45_vl", {}, {"banks": (("text", 5, 16), ("vision", 3, 8))}),
    "ming_multi_router": ("ming_multi_router", {"init_from_text_gate": False}, {}),
    "ming_multi_router-v2": ("ming_multi_router", {"gate": "sigmoid_bias", "init_from_text_gate": False}, {}),
    "moiie": ("moiie", {}, {}),
    "moiie-next_token": ("moiie", {"boundary_rule": "next_token"}, {}),
}


def make_case(case: str) -> Router:
    name, options, facts = CASES[case]
    return make_router(name, options, make_spec(**facts))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_assignment_has_the_promised_shapes_and_ranges(case, training):
    router, context = make_case(case).train(training), make_context()
    decision = router(make_hidden(context), context)
    tokens, slots = context.token_mask.numel(), router.spec.num_experts_per_tok
    assert isinstance(decision, ExpertAssignment) and decision.num_experts == EXPERTS
    assert decision.expert_index.shape == decision.expert_weight.shape == (tokens, slots)
    assert decision.expert_index.dtype == torch.int64
    assert decision.expert_index.min() >= 0 and decision.expert_index.max() <= EXPERTS
    assert decision.expert_weight.isfinite().all() and (decision.expert_weight >= 0).all()
    assert (decision.expert_weight[decision.expert_index == EXPERTS] == 0).all()
    filled = [row[row < EXPERTS].tolist() for row in decision.expert_index]
    assert all(len(set(row)) == len(row) for row in filled)
    assert decision.router_logits.shape == decision.router_probs.shape
    assert decision.router_logits.shape[0] == tokens and decision.router_logits.shape[1] >= EXPERTS
    torch.testing.assert_close(decision.router_probs.sum(-1), torch.ones(tokens))
    chosen = decision.expert_index.clamp(max=EXPERTS - 1)
    assert decision.router_logits.gather(1, chosen)[decision.expert_index < EXPERTS].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_at_inference_a_row_does_not_depend_on_the_others(case):
    router, context = make_case(case), make_context()
    hidden = make_hidden(context)
    together = router(hidden, context)
    for row in range(3):
        alone = RoutingContext(context.modality_ids[row, None], context.token_mask[row, None])
        decision = router(hidden.view(3, 10, -1)[row], alone)
        assert torch.equal(decision.expert_index, together.expert_index.view(3, 10, -1)[row])
        torch.testing.assert_close(decision.expert_weight, together.expert_weight.view(3, 10, -1)[row])


@pytest.mark.parametrize("case", CASES)
def test_task_loss_reaches_every_gate_parameter_with_finite_gradients(case):
    router, context = make_case(case).train(), make_context()
    experts, hidden = make_experts(make_spec()), make_hidden(context)
    experts(hidden, router(hidden, context)).square().mean().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("case", CASES)
def test_text_only_batch_still_gives_every_gate_a_gradient_tensor(case):
    router, context = make_case(case), text_context(2, 5)
    hidden = make_hidden(context)
    make_experts(make_spec())(hidden, router(hidden, context)).sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())


@pytest.mark.parametrize("case", CASES)
def test_logits_stay_float32_and_unchanged_under_bf16_autocast(case):
    router, context = make_case(case), make_context()
    hidden = make_hidden(context)
    expected = router(hidden, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = router(hidden, context)
    assert decision.router_logits.dtype == decision.router_probs.dtype == torch.float32
    assert_near(decision.router_logits, expected.router_logits, 1e-6)
    assert torch.equal(decision.expert_index, expected.expert_index)


@pytest.mark.parametrize("case", CASES)
def test_bf16_hidden_states_give_float32_logits(case):
    router, context = make_case(case), make_context()
    assert router(make_hidden(context).bfloat16(), context).router_logits.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_fresh_parameters_are_finite_and_not_constant(case):
    name, options, facts = CASES[case]
    router = build("router", get_mechanism("router", name), options, make_spec(**facts))
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**9)
    router.initialize(0.02)
    for parameter_name, parameter in router.named_parameters():
        assert parameter.isfinite().all() and parameter.std() > 1e-3, parameter_name
        assert parameter.mean().abs() < 0.5 * parameter.std(), parameter_name
        if name != "switch_transformer":  # which has a scale of its own
            assert 0.015 < parameter.std() < 0.025, parameter_name
    assert all((buffer == 0).all() for buffer in router.buffers())


@pytest.mark.parametrize("case", CASES)
def test_disabled_experts_are_never_chosen(case):
    router = make_case(case)
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [0, 5], 0: [1]}))
    decision = router(make_hidden(context), context)
    assert not torch.isin(decision.expert_index, torch.tensor([0, 5])).any()
    assert (decision.expert_index == 1).any()
    assert decision.expert_weight.isfinite().all()


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES.values()}))
def test_more_slots_than_candidates_are_refused(name):
    with pytest.raises(ValueError, match="num_experts_per_tok=17"):
        make_router(name, spec=make_spec(num_experts_per_tok=17))


def test_a_token_with_no_expert_left_gets_empty_slots():
    router = make_router("ernie45_vl")
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [4, 5, 6, 7]}))
    decision = router(make_hidden(context), context)
    vision = context.modality_ids.reshape(-1) == 1
    assert (decision.expert_index[vision] == EXPERTS).all() and (decision.expert_weight[vision] == 0).all()
    assert (decision.expert_index[~vision] < 4).all()
