"""Intuition-aware routing over pairs of rank-1 vectors.

    a = W_u h + M_u g        b = W_d h + M_d g        score(i, j) = a_i + b_j
    S = the K best pairs        w = softmax over the kept scores

g is the intuition of a row: how close its embedding is to each of C centroids, found by K-means before training. For
the experts `rank1_pairs`, whose expert i * n + j is the pair (i, j).

Source: Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning, arXiv:2404.08985.
"""

from math import isqrt

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("intuition_mor1e")
class IntuitionRouter(Router):
    """Sums of an up and a down score per pair, with a prior from the row's intuition.

    Args:
        spec: facts of the layer; E must be a square.
        num_clusters: C; the call brings the condition `intuition` (B, C), see `hf_moe.data.intuition`. 0 routes by the
            hidden state alone.

    Raises:
        ValueError: if E is no square, or K does not lie in [1, E].
    """

    reads = frozenset({"hidden_states", "condition"})

    def __init__(self, spec: MoELayerSpec, *, num_clusters: NonNegativeInt = 16):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "intuition_mor1e")
        pool = isqrt(spec.num_experts)
        if pool**2 != spec.num_experts:
            raise ValueError(f"num_experts={spec.num_experts} must be a square: the experts are pairs of two pools.")
        self.condition, self.num_condition_features = "intuition" if num_clusters else None, num_clusters
        # Up vectors first, then down vectors.
        self.weight = nn.Parameter(torch.empty(2 * pool, spec.hidden_size))
        if num_clusters:
            self.prior = nn.Parameter(torch.empty(2 * pool, num_clusters))

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        scores = gate_logits(hidden_states, self.weight)  # (T, 2n)
        if self.condition is not None:
            scores = scores + gate_logits(context.condition_features(self.condition, scores.device), self.prior)
        up, down = scores.chunk(2, dim=-1)
        logits = (up[:, :, None] + down[:, None, :]).flatten(1)  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        value, index = logits.topk(self.spec.num_experts_per_tok, dim=-1)  # (T, K) both
        weight = value.softmax(-1)
        return ExpertAssignment(
            index, weight, self.spec.num_experts, router_logits=logits, router_probs=logits.softmax(-1)
        )
