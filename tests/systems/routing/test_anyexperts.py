"""AnyExperts: bounds for any input, and the allocation it learns where tokens differ in what they need."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.conversion import convert_router, set_objectives
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.objectives.load_balance import LoadBalance
from hf_moe.modeling.objectives.slot_budget import SlotBudget
from hf_moe.modeling.overrides import RoutingOverrides
from hf_moe.modeling.parts import host_parts
from hf_moe.modeling.registry import build
from hf_moe.modeling.routers.anyexperts import AnyExpertsRouter
from hf_moe.modeling.routers.top_k import TopKRouter
from hf_moe.modeling.routing_context import RoutingContext
from hf_moe.training.parts import selects, train_only
from hf_moe.training.recipe import load_recipe


def make_router(seed: int = 0, hidden_size: int = 24, num_experts: int = 16, **options) -> AnyExpertsRouter:
    torch.manual_seed(seed)
    spec = MoELayerSpec(0, hidden_size, num_experts, 4, 16)
    options = {"min_slots": 2, "max_slots": 12, "probe_slot": False, **options}
    router = build("router", AnyExpertsRouter, options, spec)
    router.initialize(0.3)
    return router


def route(
    router: AnyExpertsRouter, hidden: torch.Tensor, overrides: RoutingOverrides | None = None
) -> ExpertAssignment:
    context = RoutingContext.all_text(hidden[None])
    context.overrides = overrides
    return router(hidden, context)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1.0, 1000.0]),
    bounds=st.sampled_from([(2, 8, 4.0), (2, 12, 8.0), (5, 5, 5.0), (3, 16, 15.9), (2, 12, 2.1)]),
    share=st.sampled_from([0.0, 0.2, 0.29, 0.7, 1.0]),
    gate=st.sampled_from(["included", "excluded"]),
)
def test_every_token_keeps_its_bounds_its_virtual_cap_and_finite_weights(seed, scale, bounds, share, gate):
    low, high, target = bounds
    router = make_router(
        seed, min_slots=low, max_slots=high, target_slots=target, max_virtual_share=share, virtual_gate=gate
    )
    with torch.no_grad():
        router.importance_out.mul_(20.0)
        if router.num_virtual:
            router.virtual_weight.normal_(std=0.3)
            router.virtual_bias.normal_(mean=1.0)
    hidden = torch.randn(64, 24) * scale
    decision = route(router, hidden)
    total, real = decision.signals["slots"], decision.signals["real_slots"]
    virtual = total - real
    assert total.min() >= low and total.max() <= high
    assert (virtual <= (share * total + 1e-6).floor()).all()
    assert decision.expert_weight.isfinite().all() and (decision.expert_weight >= 0).all()
    assert ((decision.expert_index < 16).sum(-1) == real).all()
    assert (decision.expert_weight[decision.expert_index == 16] == 0).all()
    if gate == "excluded":
        torch.testing.assert_close(decision.expert_weight.sum(-1)[real > 0], torch.ones(int((real > 0).sum())))
    else:
        assert (decision.expert_weight.sum(-1) <= 1 + 1e-5).all()
    decision.expert_weight.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in router.parameters())


def test_real_and_virtual_weights_sum_to_one():
    router = make_router(virtual_output="identity")
    with torch.no_grad():
        router.virtual_bias.fill_(2.0)
    decision = route(router, torch.randn(64, 24))
    assert (decision.signals["virtual_share"] > 0).any()
    torch.testing.assert_close(decision.expert_weight.sum(-1) + decision.identity_weight, torch.ones(64))


def test_virtual_slots_are_used_where_a_token_needs_fewer_experts_than_its_slots():
    router = make_router(min_slots=10, max_slots=12, target_slots=11)
    with torch.no_grad():
        router.virtual_bias.fill_(3.0)
    share = route(router, torch.randn(256, 24)).signals["virtual_share"]
    assert 0.1 < share.mean() <= 0.2 + 1e-6


def test_the_budget_moves_the_slots_of_a_trained_router():
    router = make_router()
    hidden = torch.randn(512, 24)
    means = [
        route(router, hidden, RoutingOverrides(expert_budget=budget)).signals["slots"].mean()
        for budget in (2, 4, 8, 12)
    ]
    assert means == sorted(means) and means[0] == 2 and means[-1] == 12
    assert abs(means[1] - 4) < 1.5 and abs(means[2] - 8) < 1.5  # 0.03 to 0.7 over five seeds
    router.importance_out.data.zero_()
    for budget in (4, 8):
        assert (route(router, hidden, RoutingOverrides(expert_budget=budget)).signals["slots"] == budget).all()


def test_zero_importance_weights_and_barred_virtual_slots_give_plain_top_k():
    router = make_router(fusion_alpha=0.0)
    with torch.no_grad():
        router.importance_out.zero_()
        router.virtual_bias.fill_(-5.0)
    reference = TopKRouter(router.spec)
    reference.load_state_dict({"weight": router.weight.detach()})
    hidden = torch.randn(32, 24)
    ours, theirs = route(router, hidden), reference(hidden, RoutingContext.all_text(hidden[None]))
    assert torch.equal(ours.expert_index[:, :4].sort().values, theirs.expert_index.sort().values)
    assert (ours.expert_index[:, 4:] == 16).all()
    torch.testing.assert_close(ours.expert_weight[:, :4], theirs.expert_weight)


def test_unnormalised_weights_are_the_plain_probabilities():
    router = make_router(normalise="none", max_virtual_share=0.0, fusion_alpha=0.0)
    decision = route(router, torch.randn(8, 24))
    real = decision.expert_index < 16
    probs = decision.router_probs.gather(1, decision.expert_index.clamp(max=15))
    torch.testing.assert_close(decision.expert_weight[real], probs[real])


def test_the_probe_slot_costs_a_row_in_training_only_and_changes_no_weight():
    plain, probing = make_router(), make_router(probe_slot=True)
    hidden = torch.randn(32, 24)
    without, training = route(plain, hidden), route(probing, hidden)
    evaluated = route(probing.eval(), hidden)
    assert ((training.expert_index < 16).sum(-1) == (without.expert_index < 16).sum(-1) + 1).float().mean() > 0.9
    assert torch.equal((evaluated.expert_index < 16).sum(-1), (without.expert_index < 16).sum(-1))
    torch.testing.assert_close(training.expert_weight.sum(-1), without.expert_weight.sum(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_slots": 17}, "max_slots=17"),
        ({"min_slots": 5, "max_slots": 3}, "min_slots=5"),
        ({"target_slots": 12.5}, r"a budget of 12.5 .* \[2, 12\]"),
        ({"virtual_gate": "excluded", "virtual_output": "identity"}, "virtual_output='zero'"),
        ({"min_slots": 1}, "no gradient"),
        ({"max_virtual_share": 1.5}, "max_virtual_share=1.5"),
        ({"normalise": "sum"}, "normalise='sum'"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)


def test_a_target_at_an_end_serves_but_does_not_train():
    router = make_router(target_slots=2)
    with pytest.raises(ValueError, match="without a gradient"):
        route(router, torch.randn(4, 24))
    assert (route(router.eval(), torch.randn(4, 24)).signals["slots"] == 2).all()


def test_the_budget_objective_pulls_the_mean_and_not_every_row():
    spec = MoELayerSpec(0, 24, 16, 4, 16)
    objective = SlotBudget([spec], 1.0, budget=4.0)
    slots = torch.tensor([2.0, 2.0, 6.0, 6.0], requires_grad=True)
    context = RoutingContext(torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool))
    index = torch.zeros(4, 1, dtype=torch.long)
    context.decisions[0] = ExpertAssignment(index, torch.ones(4, 1), 16, signals={"soft_real_slots": slots})
    objective.accumulate(context.decisions, context)
    objective.end_step()
    objective(context.decisions, context).sum().backward()
    assert slots.grad.abs().max() == 0


class SkillCount:
    """Tokens that need one to ten experts: the target sums the maps of a token's active skills.

    x = (16 skill bits, 32 content dimensions), RMS-normalised; half of the tokens are background with one skill, a
    quarter text with three to six, a quarter image with six to ten.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.maps = torch.randn(16, 32, 48, generator=self.generator) * 1.5 / 32**0.5

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        group = torch.randint(0, 4, (size,), generator=self.generator).clamp(max=2)  # 0, 1 and (2, 3)
        ranges = torch.tensor([[3, 7], [6, 11], [1, 2]])[group]
        draw = torch.rand(size, generator=self.generator)
        count = ranges[:, 0] + (draw * (ranges[:, 1] - ranges[:, 0])).long()
        order = torch.rand(size, 16, generator=self.generator).argsort(-1).argsort(-1)
        bits = (order < count[:, None]).float()
        content = torch.randn(size, 32, generator=self.generator)
        skills = 2 * torch.tanh(torch.einsum("tc,scd->tsd", content, self.maps))
        target = (skills * bits[..., None]).sum(1) / count[:, None] ** 0.5
        tokens = torch.cat([bits * 3 - 1, content], -1)
        return tokens / tokens.square().mean(-1, keepdim=True).sqrt(), target, group


def train_toy(router_class: type, steps: int, seed: int = 0, budget_coef: float = 1.0, change=None) -> dict:
    """Train one layer and return its error and the real slots of image, text and background tokens."""
    torch.manual_seed(seed)
    task = SkillCount(seed)
    spec = MoELayerSpec(0, 48, 16, 4, 24)
    # Without the probe, tokens at K_min never learn that another slot would help: the error is above that of top-4.
    options = {"min_slots": 2, "max_slots": 12, "probe_slot": True} if router_class is AnyExpertsRouter else {}
    router = router_class(spec, **options)
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    router.initialize(0.1)
    experts.initialize(48**-0.5)
    experts.down_proj.data.mul_(0.3 * 2**0.5)
    if change is not None:
        change(router)
    objectives = [(0.01, LoadBalance([spec], 0.01))]
    if router_class is AnyExpertsRouter and budget_coef:
        objectives.append((budget_coef, SlotBudget([spec], budget_coef, budget=3.8)))
    importance = [p for name, p in router.named_parameters() if name.startswith("importance")]
    rest = [p for name, p in router.named_parameters() if not name.startswith("importance")]
    groups = [{"params": rest + list(experts.parameters()), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups + [{"params": importance, "lr": 1.5e-2}] if importance else groups)

    def forward(tokens):
        context = RoutingContext.all_text(tokens[None])
        decision = context.decisions[0] = router(tokens, context)
        scaled = tokens if decision.input_scale is None else tokens * decision.input_scale[:, None]
        return experts(scaled, decision), context

    for _ in range(steps):
        tokens, target, _ = task.batch(384)
        output, context = forward(tokens)
        loss = (output - target).square().mean()
        for coef, objective in objectives:
            loss = loss + coef * objective(context.decisions, context).mean()
            objective.accumulate(context.decisions, context)
            objective.end_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    router.eval()
    with torch.no_grad():
        tokens, target, group = task.batch(4096)
        output, context = forward(tokens)
    real = (context.decisions[0].expert_index < 16).sum(-1).float()
    slots = {name: real[group == value].mean().item() for value, name in enumerate(("text", "image", "background"))}
    return {"error": (output - target).square().mean().item(), "mean": real.mean().item(), **slots}


def allocate(change=None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert a trained top-4 layer and run the allocation stage of the recipe on it, with all of its numbers.

    Returns the slots and the group (0 text, 1 image, 2 background) of every token of a fresh batch, (T,) each.
    """
    stage = load_recipe("anyexperts_easyvqa").stages[1]
    torch.manual_seed(seed)
    task = SkillCount(seed)
    text = LlamaConfig(hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "expert_intermediate_size": 24}
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, initializer_range=0.1, moe_config=sizes))
    layer = model.moe_layers()[0]

    def train(parameters, steps: int) -> None:
        optimizer = torch.optim.AdamW(parameters)
        for _ in range(steps):
            tokens, target, _ = task.batch(384)
            context = RoutingContext.all_text(tokens[None])
            decision = context.decisions[0] = layer.gate(tokens, context)
            scaled = tokens if decision.input_scale is None else tokens * decision.input_scale[:, None]
            loss = (layer.experts(scaled, decision) - target).square().mean()
            for objective in model.objectives.by_name.values():
                loss = loss + objective.coef * objective(context.decisions, context).mean()
                objective.accumulate(context.decisions, context)
                objective.end_step()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    set_objectives(model, {"load_balance": 0.01})
    train([{"params": [*layer.gate.parameters(), *layer.experts.parameters()], "lr": 3e-3}], steps=200)
    convert_router(model, **stage.construct["convert_router"])
    set_objectives(model, stage.objectives)
    train_only(model, stage.trainable)
    if change is not None:
        change(layer.gate)
    rate = stage.training["learning_rate"]
    groups, parts = [], host_parts(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scales = [scale for key, scale in stage.learning_rate_scales.items() if selects(key, name, parts)]
            groups.append({"params": [parameter], "lr": rate * math.prod(scales)})
    train(groups, stage.training["max_steps"])
    tokens, _, group = task.batch(4096)
    return route(layer.gate.eval(), tokens).signals["slots"], group


def moves_the_slots(slots: torch.Tensor, group: torch.Tensor) -> bool:
    """Whether some tokens no longer have four slots, and those that need more experts have more than others."""
    image, background = (slots[group == value].mean().item() for value in (1, 2))
    return image - background > 0.1 and (slots != 4).float().mean().item() > 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_the_allocation_stage_of_the_recipe_moves_the_slots_of_a_converted_layer(seed):
    slots, group = allocate(seed=seed)
    assert moves_the_slots(slots, group)
    assert 3.4 < slots.mean().item() < 3.98  # on the way from four to the budget of 3.6


def constant_importance(router: AnyExpertsRouter) -> None:
    router.importance = lambda hidden_states: hidden_states.new_zeros(hidden_states.shape[0])


def no_straight_through(router: AnyExpertsRouter) -> None:
    soft_slots = router.soft_slots
    router.soft_slots = lambda importance, target: tuple(part.detach() for part in soft_slots(importance, target))


def test_an_allocation_stage_without_importance_leaves_every_token_its_slots():
    assert not moves_the_slots(*allocate(change=constant_importance))


def allocates(result: dict) -> bool:
    """Whether images get more slots than background and the budget holds: what every stub must fail."""
    return result["image"] - result["background"] >= 3 and abs(result["mean"] / 3.8 - 1) < 0.15


def test_tokens_that_need_more_experts_get_more_slots_at_the_budget():
    assert allocates(train_toy(AnyExpertsRouter, steps=300))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_learnt_allocation_beats_fixed_top_4(seed):
    ours = train_toy(AnyExpertsRouter, steps=1000, seed=seed)
    assert allocates(ours)
    assert ours["error"] <= 0.85 * train_toy(TopKRouter, steps=1000, seed=seed)["error"]


@pytest.mark.parametrize("stub", ["flat", "hard", "free"])
def test_a_stub_of_the_mechanism_fails_the_allocation(stub):
    stubs = {"flat": {"change": constant_importance}, "hard": {"change": no_straight_through}}
    assert not allocates(train_toy(AnyExpertsRouter, steps=150, **stubs.get(stub, {"budget_coef": 0.0})))


def steps_of(router: AnyExpertsRouter, shift: float, steps: int) -> None:
    """Let a router see optimizer steps of two micro-batches each, of tokens whose importance lies around `shift`."""
    with torch.no_grad():
        router.importance_out_bias.fill_(shift)
    for step in range(2 * steps):
        hidden = torch.randn(32, 24, generator=torch.Generator().manual_seed(step))
        context = RoutingContext.all_text(hidden[None])
        context.token_mask[0, :8] = False
        router.accumulate(router(hidden, context), context)
        if step % 2:
            router.end_step()


@pytest.mark.parametrize("importance_norm", ["running_center", "running_norm"])
def test_running_statistics_bring_the_importance_back_to_its_mean(importance_norm):
    plain, normed = (make_router(importance_norm=name).train() for name in ("none", importance_norm))
    for router in (plain, normed):
        steps_of(router, shift=4.0, steps=120)
    hidden = torch.randn(256, 24, generator=torch.Generator().manual_seed(999))
    slots = {name: route(router, hidden).signals["slots"].mean() for name, router in (("plain", plain), ("n", normed))}
    assert slots["plain"] > 8.5 and abs(slots["n"] - 4) < 1.5  # up to 0.6 over five seeds
    mean, variance = normed.importance_statistics
    a = normed.importance(hidden).double()
    torch.testing.assert_close(mean, a.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(variance, a.var(), atol=0.05, rtol=0.2)
    spread = normed.normed(a).std()
    assert abs(spread - 1) < 0.3 if importance_norm == "running_norm" else torch.equal(spread, (a - mean).std())


def test_running_statistics_count_real_tokens_of_whole_steps():
    router = make_router(importance_norm="running_norm").train()
    hidden = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    context = RoutingContext.all_text(hidden[None])
    context.token_mask[0, 0] = False
    decision = router(hidden, context)
    before = router.importance_statistics.clone()
    router.accumulate(decision, context)
    assert torch.equal(router.importance_statistics, before)
    a = router.importance(hidden)[1:].double()
    router.end_step()
    expected = 0.95 * before + 0.05 * torch.stack([a.mean(), a.var(correction=0)])
    torch.testing.assert_close(router.importance_statistics, expected, atol=1e-6, rtol=1e-5)
    assert router.importance_sums.abs().sum() == 0
    router.end_step()  # a step without tokens leaves them
    torch.testing.assert_close(router.importance_statistics, expected, atol=1e-6, rtol=1e-5)
