"""Cartesian product of experts: two mixtures in series, so that every pair of sub-experts is one composite expert.

    a = sum_{i in S1} w_i A_i(x) + shared_A(x)        z = norm(x + a)
    b = sum_{j in S2} v_j B_j(z) + shared_B(z)        y = a + b

Each side has E sub-experts and a router of its own, and the second router sees what the first side has made. 2 E
sub-experts give E^2 composites B_j after A_i, each A_i in E of them. With half of the usual width, the default, both
sides together have the parameters and the FLOPs of one plain layer, besides the norm and the second gate. The pairs
that a token uses are in the decisions of both sites.

Source: CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in Mixture-of-Experts,
arXiv:2410.16077.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive
from ..block import Block, Parts
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


SIDES = ("first", "second")


@register_block("cartesian_moe")
class CartesianMoE(Block):
    """Two sides with a router, sub-experts and, where the config has one, a shared branch each.

    The sites are `1` and `"1.second"`; the experts are two banks, `first` and `second`.

    Args:
        spec: facts of the layer; its numbers of experts and of slots are those of each side.
        sub_width_ratio: width of a sub-expert as a multiple of the layer's `expert_intermediate_size`.
        inner_norm: whether z is normalised; without it z = x + a.

    Raises:
        ValueError: if a sub-expert has no width, or the layer has isolated banks or a residual mix, which belong to
            one mixture.
    """

    def __init__(self, spec: MoELayerSpec, parts: Parts, *, sub_width_ratio: Positive = 0.5, inner_norm: bool = True):
        super().__init__(spec, parts)
        width = round(spec.expert_intermediate_size * sub_width_ratio)
        if width == 0:
            raise ValueError(
                f"sub_width_ratio={sub_width_ratio} of expert_intermediate_size={spec.expert_intermediate_size} in "
                f"layer {spec.layer_idx} leaves a sub-expert no width: give a larger one."
            )
        if spec.banks or parts.residual_mix(spec) is not None:
            raise ValueError(
                f"Layer {spec.layer_idx}: the block 'cartesian_moe' has two mixtures, and expert_banks and "
                "residual_mix belong to one: leave them out."
            )
        side = replace(spec, expert_intermediate_size=width)
        banks = tuple((name, spec.num_experts, width) for name in SIDES)
        self.gate = nn.ModuleList(parts.router(replace(side, part=part)) for part in (spec.part, SIDES[1]))
        self.expert_spec = replace(side, num_experts=2 * spec.num_experts, banks=banks)
        self.experts = parts.experts(self.expert_spec)
        self.shared_expert = parts.shared_expert(side, self.experts)
        self.second_shared_expert = parts.shared_expert(side, self.experts)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=1e-6) if inner_norm else nn.Identity()

    def initialize(self, std: float) -> None:
        for weight in self.norm.parameters():
            init.ones_(weight)

    def initialized_parts(self) -> list[nn.Module]:
        return [self, self.norm]

    def experts_of(self, router: int) -> nn.Module:
        return getattr(self.experts, SIDES[router])

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        first, _ = self.route(self.gate[0], self.experts_of(0), tokens, context)  # (T, d)
        first = self.add_shared(first, tokens)
        inputs = self.norm(tokens + first)
        second, _ = self.route(self.gate[1], self.experts_of(1), inputs, context)
        if self.second_shared_expert is not None:
            second = second + self.second_shared_expert(inputs)
        return first + second
