"""Hierarchical routing: a gate over groups of experts, and in every group a gate over its experts.

    p = softmax_g a(x, u_g)        q_g = softmax_m a(x, v_{g,m})        the weight of expert (g, m) is p_g q_{m|g}

    softmax gate:  a(x, w) = w x + b        Laplace gate:  a(x, w) = -||x - w||_2 + b

The E experts are G groups of neighbours. A token takes the k1 groups with the largest p and the K / k1 experts with
the largest q in each. At each level the kept probabilities are divided by their sum, unless one is kept: its weight of
1 would give the gate no gradient, so it stays the plain probability. With K = E all experts are mixed, and the weights
sum to 1. `router_probs` are the products (T, E), `router_logits` their logarithms.

The Laplace gate looks at distances alone: it does not change when x and all keys move together. Training and inference
are the same. The balance losses of both levels are `load_balance` with `expert_groups` and with `within_groups`.

Source: On Expert Estimation in Hierarchical Mixture of Experts: Beyond Softmax Gating Functions, arXiv:2410.02935.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, gate_logits, renormalise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


Gate = Literal["laplace", "softmax"]


@register_router("hmoe_hierarchical")
class HierarchicalRouter(Router):
    """Two levels of gates.

    Args:
        spec (`MoELayerSpec`): facts of the layer.
        num_groups (`int`, *optional*, defaults to 4): G.
        top_k_groups (`int`, *optional*, defaults to 2): k1; a token takes as many experts in each of them.
        gate_level1 (`str`, *optional*, defaults to `"laplace"`): the gate over groups, `"laplace"` or `"softmax"`.
        gate_level2 (`str`, *optional*, defaults to `"laplace"`): the gates within the groups.

    Raises:
        ValueError: if K does not lie in [1, E], G does not divide E, or k1 groups cannot hold K experts evenly.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        num_groups: PositiveInt = 4,
        top_k_groups: PositiveInt = 2,
        gate_level1: Gate = "laplace",
        gate_level2: Gate = "laplace",
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "hmoe_hierarchical")
        self.experts_per_group, left = divmod(spec.num_experts, num_groups)
        self.top_k_groups = top_k_groups
        self.top_k_inner, uneven = divmod(spec.num_experts_per_tok, top_k_groups)
        if left or uneven or top_k_groups > num_groups or self.top_k_inner > self.experts_per_group:
            raise ValueError(
                f"Router 'hmoe_hierarchical' of layer {spec.layer_idx}: num_groups={num_groups} must divide "
                f"num_experts={spec.num_experts}, and num_experts_per_tok={spec.num_experts_per_tok} must be as many "
                f"experts of each of top_k_groups={top_k_groups} groups."
            )
        self.gates = (gate_level1, gate_level2)
        self.group_keys = nn.Parameter(torch.empty(num_groups, spec.hidden_size))  # u
        self.group_bias = nn.Parameter(torch.empty(num_groups))
        self.expert_keys = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))  # v
        self.expert_bias = nn.Parameter(torch.empty(spec.num_experts))

    def initialize(self, std: float) -> None:
        for keys, bias in ((self.group_keys, self.group_bias), (self.expert_keys, self.expert_bias)):
            init.normal_(keys, mean=0.0, std=std)
            init.zeros_(bias)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        outer = gate_scores(hidden_states, self.group_keys, self.group_bias, self.gates[0])  # (T, G)
        inner = gate_scores(hidden_states, self.expert_keys, self.expert_bias, self.gates[1])  # (T, E)
        inner = apply_overrides(inner, self.spec, context).unflatten(-1, (-1, self.experts_per_group))  # (T, G, M)
        closed = (inner == float("-inf")).all(-1)  # groups whose experts are all disabled
        groups = outer.masked_fill(closed, float("-inf")).log_softmax(-1)  # (T, G), log p
        experts = inner.masked_fill(closed[..., None], 0.0).log_softmax(-1)  # (T, G, M), log q
        logits = groups[..., None] + experts
        group, p = best(groups, self.top_k_groups)  # (T, k1) both
        expert, q = best(torch.take_along_dim(experts, group[..., None], 1), self.top_k_inner)  # (T, k1, K / k1) both
        index = (group[..., None] * self.experts_per_group + expert).flatten(1)  # (T, K)
        weight = (p[..., None] * q).flatten(1)
        logits = logits.flatten(1)  # (T, E)
        empty = logits.gather(1, index) == float("-inf")
        return ExpertAssignment(
            index.masked_fill(empty, self.spec.num_experts),
            weight,
            self.spec.num_experts,
            router_logits=logits,
            router_probs=logits.exp(),
        )


def gate_scores(hidden_states: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, gate: str) -> torch.Tensor:
    """Return a(x, w) (T, C), float32, of hidden states (T, d), keys (C, d) and bias (C,)."""
    if gate == "softmax":
        return gate_logits(hidden_states, keys, bias)
    lengths = hidden_states.float().square().sum(-1, keepdim=True) + keys.float().square().sum(-1)  # (T, C)
    squared = lengths - 2 * gate_logits(hidden_states, keys)
    # The root of zero has no gradient.
    return bias.float() - squared.clamp(min=1e-12).sqrt()


def best(log_probs: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return index and weight (..., number) of the largest probabilities (..., C), which are divided by their sum."""
    value, index = log_probs.topk(number, dim=-1)
    return index, renormalise(value.exp()) if number > 1 else value.exp()
