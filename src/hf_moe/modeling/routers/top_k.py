"""Token-choice top-k routing: every token goes to the K experts whose gate scores are highest.

    p = softmax(W x)        S = the K largest of p        w_i = p_i / sum_{j in S} p_j    for i in S

The base router that every other one is measured against. With K = 1 the weight stays the plain probability, since a
renormalised weight of 1 would give the gate no gradient.

Sources: GShard, arXiv:2006.16668; Mixtral of Experts, arXiv:2401.04088.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive, Share
from ..decisions import ExpertAssignment
from ..gating import (
    apply_overrides,
    check_slots,
    gate_logits,
    jitter,
    limit_capacity,
    renormalise,
    router_scores,
    select_experts,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("top_k")
class TopKRouter(Router):
    """Softmax or sigmoid gate, top-k of E.

    Args:
        spec: facts of the layer.
        score_function: `"softmax"` over the experts, or `"sigmoid"` of every expert by itself.
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1.
        jitter_noise: while training, multiply the gate's input by uniform(1 - jitter_noise, 1 + jitter_noise).
        routed_scaling_factor: multiplies the weights.
        capacity_factor: while training, an expert takes at most `ceil(capacity_factor * n * K / E)` slots of a
            sequence of n tokens, earlier positions first; `None` drops nothing. Weights are renormalised before
            slots are emptied.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk_prob: bool = True,
        jitter_noise: Share = 0.0,
        routed_scaling_factor: Positive = 1.0,
        capacity_factor: Positive | None = None,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "top_k")
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.jitter_noise = jitter_noise
        self.routed_scaling_factor = routed_scaling_factor
        self.capacity_factor = capacity_factor
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        if spec.num_experts == 1 and score_function == "softmax":
            self.reads = frozenset()  # the one expert always has all of it

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(jitter(hidden_states, self.jitter_noise, self.training), self.weight)  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        scores, probs = router_scores(logits, self.score_function)
        index, weight = select_experts(scores, logits, self.spec)  # (T, K) both
        weight = renormalise(weight) if self.norm_topk_prob else weight
        assignment = ExpertAssignment(
            index, weight * self.routed_scaling_factor, self.spec.num_experts, router_logits=logits, router_probs=probs
        )
        return limit_capacity(assignment, self.capacity_factor if self.training else None, self.spec, context)
