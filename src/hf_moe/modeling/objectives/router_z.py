"""Router z-loss: keeps the router logits small.

    value of a row = mean over its real tokens of  logsumexp(logits)^2

and the mean over layers. Large logits lose precision in the softmax, and a router that is very sure stops learning.

Source: ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv:2202.08906.
"""

import torch

from ..decisions import Decision
from ..layer_spec import Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("router_z")
class RouterZ(Objective):
    """Squared log-partition of the router logits; a usual coefficient is 0.001.

    Raises:
        ValueError: in `forward`, if no router gives logits and probabilities.
    """

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        return self.reduce_layers(
            [
                context.row_mean(decision.router_logits.logsumexp(dim=-1).square())
                for decision in self.assignments(decisions).values()
            ]
        )
