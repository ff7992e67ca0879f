"""AdaMoE routing: null experts let a token use fewer real ones.

    P = softmax([W x ; W_null x])  over E + M candidates        S = the K largest of P
    w_i = P_i / sum_{j in S, j < E} P_j        for real i in S

The M null experts output zero and have no parameters but their gate rows; a slot that goes to one is empty. So a token
uses 0 to min(K, E) experts, as the gate decides; one whose slots are all null keeps the residual only. K is larger
than a plain router's. Balance with the objective `null_load`, which holds the mean number of real experts near
K E / (E + M).

Source: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, arXiv:2406.13233.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("adamoe")
class AdaMoERouter(Router):
    """Softmax gate over E real and M null experts, top-k.

    Args:
        num_null_experts: M >= 1; E when `None` (the released Mixtral run has 16 for 8 experts). Without null experts,
            take the router `top_k`.
        null_router_init: `"copy"` starts the null rows as copies of the real ones, in turn, also of trained ones where
            a checkpoint holds no null rows; `"normal"` draws them.

    Raises:
        ValueError: if K does not lie in [1, E + M].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        num_null_experts: PositiveInt | None = None,
        null_router_init: Literal["copy", "normal"] = "copy",
    ):
        super().__init__(spec)
        num_null = spec.num_experts if num_null_experts is None else num_null_experts
        check_slots(spec, spec.num_experts + num_null, "adamoe")
        self.null_router_init = null_router_init
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.null_weight = nn.Parameter(torch.empty(num_null, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.null_router_init == "copy":
            init.copy_(self.null_weight, self._copied_rows())
        else:
            init.normal_(self.null_weight, mean=0.0, std=std)

    def _copied_rows(self) -> torch.Tensor:
        """Return the rows of the real experts in turn, one for every null expert, (M, d)."""
        rows = torch.arange(len(self.null_weight), device=self.weight.device) % self.spec.num_experts
        return self.weight[rows]

    @torch.no_grad()
    def start_from(self, old: Router) -> None:
        super().start_from(old)
        if self.null_router_init == "copy" and not isinstance(old, AdaMoERouter):
            self.null_weight.copy_(self._copied_rows())

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, torch.cat([self.weight, self.null_weight]))  # (T, E + M)
        return assign(logits, self.spec, context)
