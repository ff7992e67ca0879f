"""Uncertainty-aware routing: an expert whose logit varies under dropout weighs less.

    l_m = W (x * b_m / (1 - p)), b_m ~ Bernoulli(1 - p)        mu, v = mean and variance of l over the passes m
    q = softmax(mu) / (v + eps), made to sum to 1        S = the K largest of q        w_i = q_i / sum_{j in S} q_j

q is the softmax of mu - log(v + eps), the router's logits. A linear gate has the moments of infinitely many passes in
closed form, in two times the FLOPs of a gate and without a draw:

    mu = W x        v = p / (1 - p) W^2 x^2        squares by element

So it is at inference, where no token's experts hang on chance or on other tokens, and by default while training. M > 0
passes are drawn while training, as in the paper, in M times the FLOPs of a gate besides the drawing of M T d numbers.
The paper's formula of the calibration was not found: inverse variance is chosen here. With K = 1 the weight is q, or
the gate would have no gradient.

Source: Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation, arXiv:2312.16610.
"""

from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Interval, NonNegativeInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("mofme")
class UncertaintyRouter(Router):
    """A softmax gate over logits that their own variance calibrates, top-k.

    Args:
        uncertainty_passes: M while training; 0 for the closed form.
        router_dropout: p.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        uncertainty_passes: NonNegativeInt = 0,
        router_dropout: Annotated[float, Interval(0, 1, open_maximum=True)] = 0.1,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "mofme")
        self.passes = uncertainty_passes
        self.dropout = router_dropout
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        mean, variance = self.moments(hidden_states)
        logits = mean - (variance + 1e-6).log()
        return assign(logits, self.spec, context, norm=self.spec.num_experts_per_tok > 1, masked=False)

    def moments(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance of the logits under dropout, (T, E) float32 both."""
        if self.training and self.passes > 0:
            dropped = F.dropout(hidden_states.expand(self.passes, -1, -1), self.dropout)  # (M, T, d)
            logits = gate_logits(dropped, self.weight)  # (M, T, E)
            return logits.mean(0), logits.var(0, correction=0)
        odds = self.dropout / (1.0 - self.dropout)
        variance = odds * gate_logits(hidden_states.float().square(), self.weight.float().square())
        return gate_logits(hidden_states, self.weight), variance
