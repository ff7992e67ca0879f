"""Sparsity L1: every token's routing distribution should be near to one expert.

    value of a row = mean over its real tokens of  || P_t / ||P_t||_2 ||_1

and the mean over layers. It lies between 1, for one-hot distributions, and sqrt(C), for uniform ones over C
candidates. Alone it lets the router collapse: it goes with a loss on the mean load, in its paper `mean_importance`.

Source: SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts, arXiv:2105.03036.
"""

import torch

from ..decisions import Decision
from ..layer_spec import Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("sparsity_l1")
class SparsityL1(Objective):
    """Ratio of the 1-norm and the 2-norm of `router_probs`, per token.

    Raises:
        ValueError: in `forward`, if no router gives probabilities.
    """

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for decision in self.assignments(decisions).values():
            probs = decision.router_probs  # (T, C), whose rows sum to 1
            values.append(context.row_mean(probs.sum(-1) / probs.norm(dim=-1).clamp(min=1e-20)))
        return self.reduce_layers(values)
