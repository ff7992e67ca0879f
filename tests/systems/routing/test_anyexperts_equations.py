"""AnyExperts against the seven steps of its docstring, written out token by token, with their gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.routers.anyexperts import AnyExpertsRouter
from hf_moe.modeling.routing_context import RoutingContext


WIDTH, EXPERTS, TOKENS = 24, 16, 48
CASES = {
    "virtual": {},
    "excluded": {"virtual_gate": "excluded"},
    "identity": {"virtual_output": "identity"},
    "probe": {"probe_slot": True},
    "plain probabilities": {"normalise": "none"},
    "plain with identity": {"normalise": "none", "virtual_output": "identity", "probe_slot": True},
    "no room for virtual": {"max_virtual_share": 0.0, "max_slots": 16},
    "biased": {"bias_update_rate": 0.001, "max_virtual_share": 0.7},
    "centred": {"importance_norm": "running_center"},
    "normed": {"importance_norm": "running_norm", "ste_tau": 0.2},
}


def make_router(options: dict) -> AnyExpertsRouter:
    torch.manual_seed(0)
    defaults = {"min_slots": 2, "max_slots": 12, "target_slots": 6.0, "probe_slot": False, "max_virtual_share": 0.5}
    router = AnyExpertsRouter(MoELayerSpec(0, WIDTH, EXPERTS, 4, 16), **{**defaults, **options})
    router.initialize(0.3)
    with torch.no_grad():
        router.importance_in_bias.normal_(std=0.3)
        router.importance_out.normal_(std=1.0)
        router.importance_out_bias.fill_(0.4)
        router.alpha.fill_(0.3)
        router.slope.fill_(0.2)
        if router.num_virtual:
            router.virtual_weight.normal_(std=0.1)
            router.virtual_bias.normal_(mean=0.5, std=0.3)
            router.gamma.fill_(1.5)
        if router.bias_update_rate:
            router.e_score_correction_bias.normal_(std=0.5)
        if router.importance_norm != "none":
            router.importance_statistics.copy_(torch.tensor([0.7, 2.5]))
    return router


def token_by_token(router: AnyExpertsRouter, h: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what one token (d,) float64 gets: a weight for every expert (E,), and the signals."""
    p = {name: parameter.double() for name, parameter in router.named_parameters()}
    low, high = router.min_slots, router.max_slots
    a = p["importance_out"][0] @ F.gelu(p["importance_in"] @ h + p["importance_in_bias"]) + p["importance_out_bias"][0]
    w = a.sigmoid()
    scale = 1 + p["alpha"][0] * w
    fused = scale * h
    if router.importance_norm != "none":
        mean, variance = router.importance_statistics
        a = a - mean if router.importance_norm == "running_center" else (a - mean) / (variance + 1e-6).sqrt()
    b = (router.target_slots - low) / (high - low)
    u = torch.sigmoid(F.softplus(p["slope"][0]) * a + math.log(b / (1 - b)))
    k_soft = low + (high - low) * u
    k_total = round(k_soft.item())

    logits = p["weight"] @ fused
    scores = {("real", expert): logits[expert] for expert in range(EXPERTS)}
    wanted = {key: score.item() + router.e_score_correction_bias[key[1]].item() for key, score in scores.items()}
    if router.num_virtual:
        margin = sorted(logits.tolist(), reverse=True)[k_total - 1]
        virtual = margin + p["virtual_weight"] @ fused + p["virtual_bias"] - F.relu(p["gamma"][0]) * (u - b)
        for rank in virtual.argsort(descending=True)[: math.floor(router.max_virtual_share * k_total + 1e-6)].tolist():
            scores[("virtual", rank)] = virtual[rank]
            wanted[("virtual", rank)] = virtual[rank].item()
    width = min(high + router.probe_slot, EXPERTS)
    ranked = sorted(wanted, key=wanted.__getitem__, reverse=True)[:width]

    soft = [torch.sigmoid((k_soft - rank - 0.5) / router.ste_tau) for rank in range(width)]
    mask = [float(rank < k_total) + soft[rank] - soft[rank].detach() for rank in range(width)]
    weighed = list(enumerate(ranked[:k_total]))
    if router.virtual_gate == "excluded" or (router.normalise == "none" and router.virtual_output == "zero"):
        weighed = [(rank, key) for rank, key in weighed if key[0] == "real"]
    if router.probe_slot and router.training and k_total < width and ranked[k_total][0] == "real":
        weighed.append((k_total, ranked[k_total]))
    weight = {key: scores[key].exp() * mask[rank] for rank, key in weighed}
    total = logits.exp().sum() if router.normalise == "none" else sum(weight.values())
    zero = torch.zeros((), dtype=torch.float64)
    real = sum(kind == "real" for kind, _ in ranked[:k_total])
    identity = sum((value / total for (kind, _), value in weight.items() if kind == "virtual"), zero)
    return {
        "weight": torch.stack([weight.get(("real", expert), zero) / total for expert in range(EXPERTS)]),
        # What the balance counts: real slots, the probe not among them.
        "chosen": torch.tensor([float(("real", expert) in ranked[:k_total]) for expert in range(EXPERTS)]).double(),
        "identity_weight": identity if router.virtual_output == "identity" else zero,
        "input_scale": scale,
        "importance": w,
        "slots": torch.tensor(float(k_total)).double(),
        "real_slots": torch.tensor(float(real)).double(),
        "virtual_share": torch.tensor(1 - real / k_total).double(),
        "soft_real_slots": sum((m for m, (kind, _) in zip(mask, ranked, strict=True) if kind == "real"), zero),
    }


def routed(router: AnyExpertsRouter, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    decision = router(hidden, RoutingContext.all_text(hidden[None]))
    table = torch.zeros(len(hidden), EXPERTS + 1).scatter_add(1, decision.expert_index, decision.expert_weight)
    identity = decision.identity_weight
    chosen = torch.zeros(len(hidden), EXPERTS + 1).scatter(1, decision.chosen_index, 1.0)
    return {
        "weight": table[:, :EXPERTS],
        "chosen": chosen[:, :EXPERTS],
        "identity_weight": torch.zeros(len(hidden)) if identity is None else identity,
        "input_scale": decision.input_scale,
        **decision.signals,
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_equations(case, training):
    router = make_router(CASES[case]).train(training)
    hidden = torch.randn(TOKENS, WIDTH)
    found = routed(router, hidden)
    tokens = [token_by_token(router, row.double()) for row in hidden]
    expected = {name: torch.stack([token[name] for token in tokens]) for name in tokens[0]}
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    slots = found["slots"]
    assert slots.unique().numel() > 4  # else nothing was tried
    assert bool(found["virtual_share"].max() > 0.2) is (router.num_virtual > 0)
    factors = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in expected.items()}
    learnt = ("weight", "identity_weight", "input_scale", "importance", "soft_real_slots")
    parameters = dict(router.named_parameters())
    for name in learnt:
        if not expected[name].requires_grad:
            continue
        ours, theirs = (
            torch.autograd.grad(
                (factors[name] * value.double()).sum(), parameters.values(), allow_unused=True, retain_graph=True
            )
            for value in (found[name], expected[name])
        )
        for parameter, left, right in zip(parameters, ours, theirs, strict=True):
            left, right = (torch.zeros(1) if gradient is None else gradient for gradient in (left, right))
            largest = max(right.abs().max().item(), 1e-3)
            assert (left - right).abs().max() < 1e-3 * largest, f"{parameter} through {name}"


@pytest.mark.parametrize("budget", [2.0, 2.001, 3.0, 11.999, 12.0])
def test_a_target_near_an_end_is_bounded_and_one_at_an_end_is_exact(budget):
    router = make_router({"target_slots": 6.0}).eval()
    importance = torch.linspace(-3, 3, 7)
    k_soft, excess = router.soft_slots(importance, budget)
    if budget in (2.0, 12.0):
        assert (k_soft == budget).all() and (excess == 0).all()
        return
    share = (budget - 2) / 10
    offset = min(max(math.log(share / (1 - share)), -4.0), 4.0)
    use = torch.sigmoid(F.softplus(router.slope.detach()) * importance + offset)
    torch.testing.assert_close(k_soft, 2 + 10 * use)
    torch.testing.assert_close(excess, use - share)
