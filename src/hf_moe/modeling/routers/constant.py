"""Every token uses every expert, with a weight of 1: plain LoRA with one expert, a dense bank with more."""

import torch

from ..decisions import ExpertAssignment
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("constant")
class ConstantRouter(Router):
    """All experts, always; no parameters. `num_experts_per_tok` does not matter."""

    reads = frozenset()

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = torch.arange(self.spec.num_experts, device=hidden_states.device)
        index = experts.expand(len(hidden_states), -1)  # (T, E)
        weight = torch.ones(index.shape, device=hidden_states.device)
        return ExpertAssignment(index, weight, self.spec.num_experts)
