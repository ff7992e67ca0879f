"""The plain mixture of experts: a router, experts, and an optional branch that every token uses.

    y = sum_{i in S} w_i E_i(x) + shared(x)        S and w from the router

Sources: GShard, arXiv:2006.16668; DeepSeekMoE, arXiv:2401.06066 (the shared branch).
"""

import torch

from ..block import Block, Parts
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


@register_block("moe")
class MoELayer(Block):
    """A router, experts, and the shared branch if the config has one."""

    def __init__(self, spec: MoELayerSpec, parts: Parts):
        super().__init__(spec, parts)
        self.gate = parts.router(spec)
        self.experts = parts.experts(spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        output, _ = self.route(self.gate, self.experts, tokens, context)
        return self.add_shared(output, tokens)
