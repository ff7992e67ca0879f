"""MoEC: experts in clusters, which share their tokens early in training, and a dropout that leaves none of them empty.

    p = softmax(W x)        the K largest of p; with K = 1 the weight is p itself        C clusters of E / C neighbours

Two things hold in training alone; at inference this is top-k, and no token depends on another.

The signal `cluster_loss`, for the objective `signal`, pulls the experts of a token's cluster together and the clusters
apart, so that an expert also learns from the tokens of its siblings:

    cluster_loss = E^2 (V_in - inter_weight V_out)
    V_in  = variance of p over the cluster of the token's best expert
    V_out = variance over the clusters of the mean of p in each

It is least, -inter_weight (C - 1), where p is uniform in one cluster and 0 outside. E^2 keeps its size for any E.

Expert dropout: a forward draws floor(expert_dropout * E / C) experts of every cluster, at least one stays, and no
token may choose them: it goes to a sibling. Drawn from all experts (`dropout_scope="global"`), some clusters may lose
all of theirs.

Source: MoEC: Mixture of Expert Clusters, arXiv:2207.09094. The form of the variances, the coefficients and the rate
were not found in the text that was read, and were chosen here.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegative, PositiveInt, Share
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("moec")
class MoECRouter(Router):
    """Softmax top-k over clusters of experts.

    Args:
        spec: facts of the layer; the paper has K = 1.
        num_clusters (`int`, *optional*): C, must divide E; the divisor of E that is nearest to its root when absent.
        inter_weight (`float`, *optional*, defaults to 1.0): weight of the variance between clusters.
        expert_dropout (`float`, *optional*, defaults to 0.5): share of the experts that is dropped.
        dropout_scope (`str`, *optional*, defaults to `"cluster"`): what it is a share of: the experts of every
            `"cluster"`, or all experts, `"global"` (the paper's comparison).

    Raises:
        ValueError: if K does not lie in [1, E], or C does not divide E.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        num_clusters: PositiveInt | None = None,
        inter_weight: NonNegative = 1.0,
        expert_dropout: Share = 0.5,
        dropout_scope: Literal["cluster", "global"] = "cluster",
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "moec")
        divisors = [number for number in range(1, spec.num_experts + 1) if spec.num_experts % number == 0]
        if num_clusters is not None and num_clusters not in divisors:
            raise ValueError(
                f"Router 'moec' of layer {spec.layer_idx}: num_clusters={num_clusters} must divide num_experts="
                f"{spec.num_experts}; allowed are {divisors}."
            )
        self.num_clusters = num_clusters or min(divisors, key=lambda number: abs(number - spec.num_experts**0.5))
        self.inter_weight = inter_weight
        self.expert_dropout = expert_dropout
        self.dropout_scope = dropout_scope
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def cluster_loss(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the loss of every token, (T,), by its probabilities (T, E)."""
        clustered = probs.unflatten(-1, (self.num_clusters, -1))  # (T, C, E / C)
        best = F.one_hot(clustered.amax(-1).argmax(-1), self.num_clusters)  # (T, C)
        intra = (clustered.var(-1, correction=0) * best).sum(-1)
        inter = clustered.mean(-1).var(-1, correction=0)
        return self.spec.num_experts**2 * (intra - self.inter_weight * inter)

    def dropped_experts(self, device: torch.device) -> torch.Tensor:
        """Return which experts a forward may not use, (E,) bool."""
        sets = self.num_clusters if self.dropout_scope == "cluster" else 1
        size = self.spec.num_experts // sets
        number = min(int(self.expert_dropout * size), size - 1)
        order = torch.rand(sets, size, device=device).argsort(-1)
        return (order < number).flatten()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        loss = self.cluster_loss(logits.softmax(-1))
        if self.training:
            logits = logits.masked_fill(self.dropped_experts(logits.device), float("-inf"))
        decision = assign(logits, self.spec, context, norm=self.spec.num_experts_per_tok > 1, masked=self.training)
        decision.signals["cluster_loss"] = loss
        return decision
