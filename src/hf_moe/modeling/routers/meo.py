"""Merging experts into one: the weights of the chosen experts are mixed, and one expert runs, whatever K is.

    z = mean of the tokens before a token's block        S = the K largest of W z        g = softmax over S of W z
    W_merged = sum_{e in S} g_e W_e                      y = W_merged x

A block is `block_size` real positions of a row, see [`BlockPooledRouter`]. For one matrix the merged expert is the
mixture of the experts' outputs; for a feed-forward, whose activation comes after the merged first matrix, it is
another model.

The gate is linear, so that the mean of the tokens' logits is the logit of their mean: the logits are what is
remembered across decoding.

Source: Merging Experts into One: Improving Computational Efficiency of Mixture of Experts, arXiv:2310.09832, which
pools whole sequences, for encoders: `block_size=None`.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block_pooling import BlockPooledRouter
from ..decisions import ParameterMixture
from ..gating import apply_overrides, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("meo")
class MeoRouter(BlockPooledRouter):
    """Top-k gate on what a row has said before a block, for experts that are merged.

    Args:
        block_size (`int`, *optional*, defaults to 32): how many positions share a merged expert; `None` pools the
            whole row for all of its tokens, which shows a token the later ones: for encoders.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(self, spec: MoELayerSpec, *, block_size: PositiveInt | None = 32):
        super().__init__(spec, block_size)
        check_slots(spec, spec.num_experts, "meo")
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ParameterMixture:
        logits, first, group = self.pool_blocks(gate_logits(hidden_states, self.weight), context)
        logits = apply_overrides(logits, self.spec, context)  # (T, E)
        value, index = logits.topk(self.spec.num_experts_per_tok, dim=-1)  # (T, K) both
        gates = torch.zeros_like(logits).scatter(1, index, value.softmax(-1))
        return ParameterMixture(gates[first], group, self.spec.num_experts, router_logits=logits)
