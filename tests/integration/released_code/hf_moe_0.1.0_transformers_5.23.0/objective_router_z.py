# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""Router z-loss: keeps the router logits small.

    value of a row = mean over its real tokens of  logsumexp(logits)^2

and the mean over layers. Large logits lose precision in the softmax, and a router that is very sure stops learning.

Source: ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv:2202.08906.
"""

import torch

from .registry import register_objective
from .routing import Decision, Objective, RoutingContext


@register_objective("router_z")
class RouterZ(Objective):
    """Squared log-partition of the router logits; a usual coefficient is 0.001.

    Args:
        specs: the MoE layers of the model.
        coef: coefficient of the loss, >= 0.

    Raises:
        ValueError: in `forward`, if no router gives logits and probabilities.
    """

    def forward(self, decisions: dict[int, Decision], context: RoutingContext) -> torch.Tensor:
        return self.reduce_layers(
            [
                context.row_mean(decision.router_logits.logsumexp(dim=-1).square())
                for decision in self.assignments(decisions).values()
            ]
        )
