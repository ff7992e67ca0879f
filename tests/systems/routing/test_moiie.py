"""MoIIE against strictly partitioned experts: what the shared group between the modalities is worth, and where."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hf_moe.modeling.experts.ffn import FfnExperts
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.objectives.load_balance import LoadBalance
from hf_moe.modeling.routers.moiie import MoIIERouter
from hf_moe.modeling.routing_context import RoutingContext


CONTENT = 16
MOIIE, PARTITIONED = (0.25, 0.5, 0.25), (0.5, 0.0, 0.5)


class HalfCommon:
    """Tokens of two modalities. Half of them need a map common to both, half one that only their modality has.

    x = (bits that name the map, 16 content dimensions); two common maps and one of each modality for four experts.
    """

    def __init__(self, seed: int, num_experts: int):
        self.generator = torch.Generator().manual_seed(seed + 100)  # other numbers than the layer began with
        self.common, self.own = num_experts // 2, num_experts // 4
        self.width = self.common + self.own + CONTENT
        shapes = (self.common, CONTENT, self.width), (2 * self.own, CONTENT, self.width)
        self.maps = torch.cat([torch.randn(shape, generator=self.generator) for shape in shapes]) * 1.5 / CONTENT**0.5

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, RoutingContext]:
        modality, is_common, common, own = (
            torch.randint(high, (size,), generator=self.generator) for high in (2, 2, self.common, self.own)
        )
        content = torch.randn(size, CONTENT, generator=self.generator)
        which = torch.where(is_common == 1, common, self.common + modality * self.own + own)
        target = torch.tanh(torch.einsum("tc,tcd->td", content, self.maps[which]))
        name = torch.where(is_common == 1, common, self.common + own)
        tokens = torch.cat([3.0 * F.one_hot(name, self.common + self.own), content], dim=-1)
        context = RoutingContext(modality[None], torch.ones_like(modality[None], dtype=torch.bool))
        return tokens, target, context


def error(fractions: tuple[float, ...], seed: int, num_experts: int, steps: int) -> float:
    """Train a layer of top-2 and return its error as a share of the target's variance."""
    task = HalfCommon(seed, num_experts)
    torch.manual_seed(seed)
    spec = MoELayerSpec(0, task.width, num_experts, 2, 8)
    router = MoIIERouter(spec, group_fractions=fractions)
    router.initialize(0.1)
    experts = FfnExperts(SimpleNamespace(_experts_implementation="ragged"), spec)
    experts.initialize(task.width**-0.5)
    balance = LoadBalance([spec], 0.001)
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], lr=1e-2)
    for _ in range(steps):
        tokens, target, context = task.batch(256)
        decision = context.decisions[0] = router(tokens, context)
        loss = (experts(tokens, decision) - target).square().mean()
        loss = loss + 0.001 * balance(context.decisions, context).mean()
        balance.accumulate(context.decisions, context)
        balance.end_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, target, context = task.batch(4096)
        output = experts(tokens, router(tokens, context))
    return ((output - target).square().mean() / target.var()).item()


def mean_ratio(num_experts: int, steps: int) -> float:
    """Return the error of MoIIE over that of partitioned experts, the mean of four seeds."""
    ratios = [
        error(MOIIE, seed, num_experts, steps) / error(PARTITIONED, seed, num_experts, steps) for seed in range(4)
    ]
    return sum(ratios) / len(ratios)


def test_shared_experts_beat_partitioned_ones_where_half_of_the_tokens_need_a_common_map():
    """At equal experts, width and k, so at equal parameters and equal active parameters.

    The regime matters: here a token needs either a common or an own map, and partitioned banks must learn the common
    ones twice. Where every token needs one of each at once, partitioned experts, which with k = 2 of 2 have no choice
    to learn, are ahead; so they are with k = 1, where a renormalised weight gives MoIIE's gates no gradient.

    Single seeds give ratios of 0.76 to 1.05, means of four 0.84 to 0.91.
    """
    assert mean_ratio(num_experts=4, steps=250) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [4, 8])
def test_the_advantage_remains_after_400_steps(num_experts):
    assert mean_ratio(num_experts, steps=400) < 0.98
