"""Top-p routing: the shortest prefix above the threshold, and more experts where the label is uncertain."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.objectives.local_entropy import LocalEntropy
from hf_moe.modeling.overrides import RoutingOverrides
from hf_moe.modeling.registry import build
from hf_moe.modeling.routers.dynamic_moe_top_p import DynamicMoETopPRouter
from hf_moe.modeling.routing_context import RoutingContext


WIDTH, EXPERTS = 16, 16


def make_router(num_experts: int = EXPERTS, seed: int = 0, std: float = 0.3, **options) -> DynamicMoETopPRouter:
    torch.manual_seed(seed)
    # One slot per token in the spec: a router that read it would never use a second expert.
    router = build("router", DynamicMoETopPRouter, options, MoELayerSpec(0, WIDTH, num_experts, 1, 16))
    router.initialize(std)
    return router


def route(router: DynamicMoETopPRouter, hidden: torch.Tensor, overrides=None) -> ExpertAssignment:
    context = RoutingContext.all_text(hidden[None])
    context.overrides = overrides
    return router(hidden, context)


def active(decision: ExpertAssignment) -> torch.Tensor:
    """Return the number of experts of every token, (T,) float32."""
    return (decision.expert_index < decision.num_experts).sum(-1).float()


def test_a_flat_gate_takes_seven_of_sixteen_experts_and_a_certain_one_a_single_one():
    router = make_router()
    router.weight.data.zero_()
    assert (active(route(router, torch.randn(8, WIDTH))) == 7).all()  # 6 / 16 does not exceed 0.4
    router.weight.data[3] = 1000.0
    decision = route(router, torch.ones(8, WIDTH))
    assert (active(decision) == 1).all() and (decision.expert_index[:, 0] == 3).all()


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
def test_the_kept_mass_exceeds_the_threshold_and_would_not_without_its_last_expert(threshold):
    decision = route(make_router(top_p_threshold=threshold), torch.randn(256, WIDTH))
    count = active(decision).long()
    assert threshold == 0.0 or count.min() < count.max()
    weight = decision.expert_weight.double()
    last = weight.gather(1, count[:, None] - 1).squeeze(-1)
    assert (weight.sum(-1) > threshold).all()
    assert (weight.sum(-1) - last <= threshold + 1e-6).all()
    # The kept experts are the most probable ones, weighed by their plain probability.
    ordered = decision.router_probs.sort(dim=-1, descending=True).values
    rank = torch.arange(EXPERTS)
    torch.testing.assert_close(decision.expert_weight, ordered.masked_fill(rank >= count[:, None], 0.0))


def test_threshold_one_keeps_every_expert_that_has_any_probability():
    hidden = torch.randn(8, WIDTH)
    router = make_router(top_p_threshold=1.0)
    assert (active(route(router, hidden)) == EXPERTS).all()
    assert (active(route(router, hidden, RoutingOverrides(disabled_experts={0: [0, 5]}))) == EXPERTS - 2).all()


def test_disabled_experts_are_never_chosen():
    decision = route(make_router(), torch.randn(64, WIDTH), RoutingOverrides(disabled_experts={0: [0, 5]}))
    assert not torch.isin(decision.expert_index, torch.tensor([0, 5])).any()
    assert (decision.router_logits[:, [0, 5]] == float("-inf")).all()
    torch.testing.assert_close(decision.router_probs, decision.router_logits.softmax(-1))


def test_normalised_weights_sum_to_one():
    hidden = torch.randn(64, WIDTH)
    plain, normalised = (route(make_router(norm_topk_prob=norm), hidden) for norm in (False, True))
    assert torch.equal(plain.expert_index, normalised.expert_index)
    assert plain.expert_weight.sum(-1).max() < 0.99
    torch.testing.assert_close(normalised.expert_weight.sum(-1), torch.ones(64))


def test_a_cap_bounds_the_slots_also_below_the_threshold():
    decision = route(make_router(std=0.0, top_p_threshold=0.9, max_experts_per_tok=3), torch.randn(8, WIDTH))
    assert decision.expert_index.shape == (8, 3) and (active(decision) == 3).all()
    torch.testing.assert_close(decision.expert_weight.sum(-1), torch.full((8,), 3 / EXPERTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p_threshold": 1.5}, r"top_p_threshold=1.5 must lie in \[0, 1\]"),
        ({"max_experts_per_tok": 0}, "max_experts_per_tok=0"),
        ({"max_experts_per_tok": 17}, "max_experts_per_tok=17"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)


def train_toy(coef: float = 0.0, change=None, seed: int = 0) -> tuple[float, float]:
    """Train one layer to classify noisy words, and return the mean experts of certain and of ambiguous ones.

    A word of the first eight has one class of its own, one of the last eight has four classes that are equally likely.
    """
    router = make_router(num_experts=8, seed=seed, std=0.1)
    if change is not None:
        change(router)
    spec = router.spec
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    experts.initialize(WIDTH**-0.5)
    generator = torch.Generator().manual_seed(seed + 100)  # other numbers than the gate began with
    words = torch.randn(16, WIDTH, generator=generator)
    classes = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(16)])
    classes[:8] = torch.arange(8)[:, None]

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        word = torch.randint(16, (size,), generator=generator)
        hidden = words[word] + 0.3 * torch.randn(size, WIDTH, generator=generator)
        return hidden, classes[word, torch.randint(4, (size,), generator=generator)], word < 8

    entropy = LocalEntropy([spec], coef)
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], lr=1e-2)
    for _ in range(300):
        hidden, label, _ = batch(128)
        context = RoutingContext.all_text(hidden[None])
        decision = context.decisions[0] = router(hidden, context)
        loss = F.cross_entropy(experts(hidden, decision), label)
        loss = loss + coef * entropy(context.decisions, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hidden, _, certain = batch(2048)
    count = active(route(router, hidden))
    return count[certain].mean().item(), count[~certain].mean().item()


def grows_with_ambiguity(experts_of: tuple[float, float]) -> bool:
    """Whether ambiguous words use more experts than certain ones: what every stub must fail."""
    certain, ambiguous = experts_of
    return ambiguous - certain > 0.5


def frozen_gate(router: DynamicMoETopPRouter) -> None:
    router.weight.requires_grad_(False)


def fixed_number_of_experts(router: DynamicMoETopPRouter) -> None:
    router.top_p_threshold, router.max_experts_per_tok = 1.0, 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ambiguous_tokens_use_more_experts_and_the_entropy_loss_saves_some(seed):
    without, with_entropy = train_toy(seed=seed), train_toy(coef=0.01, seed=seed)
    assert grows_with_ambiguity(without)
    assert sum(with_entropy) < sum(without)  # by 0.13 to 0.66 in nine runs


@pytest.mark.parametrize("stub", [frozen_gate, fixed_number_of_experts])
def test_a_stub_of_the_mechanism_spends_alike_on_certain_and_ambiguous_tokens(stub):
    assert not grows_with_ambiguity(train_toy(change=stub))
