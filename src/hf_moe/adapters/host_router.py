"""The routing of the MoE model that is adapted: adapter i goes with the host's expert i.

    y = sum_{i in top-K} g_i (E_i(h) + A_i(h))

Source: PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model, arXiv:2411.08212 (PERFT-E).
"""

from typing import Any

import torch

from ..modeling.decisions import ExpertAssignment
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext


class HostRouter(Router):
    """Takes the decision that the target, the host's stack of experts, is called with; no parameters."""

    mechanism_name = "host"
    reads = frozenset({"call"})

    def from_call(self, *args: Any) -> ExpertAssignment:
        """Return the decision among the arguments behind the hidden states, in the call of a stack of experts.

        Raises:
            ValueError: if the target is called with something else.
        """
        # Our own experts; a checkpoint that carries its code has an assignment class of its own.
        if len(args) == 1 and hasattr(args[0], "expert_index"):
            return ExpertAssignment(args[0].expert_index, args[0].expert_weight, self.spec.num_experts)
        if len(args) == 2 and all(isinstance(item, torch.Tensor) and item.dim() == 2 for item in args):
            return ExpertAssignment(args[0], args[1], self.spec.num_experts)
        raise ValueError(
            "The router 'host' works on the experts module of a MoE layer, called with (hidden states, expert index "
            f"(T, K), weight (T, K)); this target was called with {[type(item).__name__ for item in args]} instead."
        )

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        raise ValueError("The router 'host' decides from the call of its target, not from hidden states.")
