"""The routing of the MoE model that is adapted: adapter i goes with the host's expert i.

    y = sum_{i in top-K} g_i (E_i(h) + A_i(h))

Source: PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model, arXiv:2411.08212 (PERFT-E).
"""

from typing import Any

import torch

from ..modeling.decisions import ExpertAssignment
from ..modeling.routing import Router
from ..modeling.routing_context import RoutingContext


def index_and_weight(args: tuple) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return index and weight (T, K) of what a stack of experts is called with; `None` where it is something else."""
    # Our own experts; a checkpoint that carries its code has an assignment class of its own.
    if len(args) == 1 and hasattr(args[0], "expert_index"):
        return args[0].expert_index, args[0].expert_weight
    return args if len(args) == 2 and all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in args) else None


class HostRouter(Router):
    """Takes the decision that the target, the host's stack of experts, is called with; no parameters."""

    mechanism_name = "host"
    reads = frozenset({"call"})

    def from_call(self, *args: Any) -> ExpertAssignment:
        """Return the decision among the arguments behind the hidden states, in the call of a stack of experts."""
        found = index_and_weight(args)
        if found is not None:
            return ExpertAssignment(*found, self.spec.num_experts)
        raise ValueError(
            "The router 'host' works on the experts module of a MoE layer, called with (hidden states, expert index "
            f"(T, K), weight (T, K)); this target was called with {[type(item).__name__ for item in args]} instead."
        )

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        raise ValueError("The router 'host' decides from the call of its target, not from hidden states.")
