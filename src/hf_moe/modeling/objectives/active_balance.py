"""Active balance: candidates that many tokens activate should get little weight, for routers of any number of slots.

    value of a row = mean over its real tokens t of  N_t sum_i f_i P_{t, i}

P_t are the router's probabilities, 0 for candidates that t does not activate, null experts included; f_i is the share
of the tokens that activate i, from the previous optimizer step, and N_t the number of candidates that t may activate.
Each null expert has the mean share of all null ones. The mean over layers is taken. The value is k where all tokens
spread evenly over k candidates at random, N where all activate the same ones.

With `final_coef` the coefficient goes there linearly over the training, as UniMoE-Audio's goes from 0.025 to 0.001.

Source: UniMoE-Audio: Unified Speech and Music Generation with Dynamic-Capacity MoE, arXiv:2510.13344.
"""

import torch

from ...configuration.checks import NonNegative
from ..decisions import Decision, ExpertAssignment
from ..layer_spec import MoELayerSpec, Site
from ..population import StatisticObjective
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("active_balance")
class ActiveBalance(StatisticObjective):
    """Balance over the candidates that tokens activate.

    Args:
        final_coef (`float`, *optional*): the coefficient at the end of training; it stays the same when `None`.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, final_coef: NonNegative | None = None):
        super().__init__(specs, coef)
        self.final_share = 1.0 if final_coef is None or coef == 0.0 else final_coef / coef
        # The tokens that activate each expert, null experts in all, and all tokens.
        self.keep(lambda spec: torch.zeros(spec.num_experts + 2, dtype=torch.long))

    def row_counts(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return these counts for every row, (B, E + 2)."""
        mask = context.tokens("token_mask", decision.router_probs.device)[:, None]
        active = (decision.router_probs > 0.0) & mask  # (T, C)
        real, null = active.split([decision.num_experts, active.shape[1] - decision.num_experts], dim=1)
        counts = torch.cat([real, null.sum(1, keepdim=True), mask], dim=1)  # (T, E + 2)
        return counts.view(*context.token_mask.shape, -1).sum(1)

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.assignments(decisions).items():
            own = self.row_counts(decision, context)
            known = self.population(site, own.device)
            counts = torch.where(known[-1] > 0, known, own).float()  # (B, E + 2)
            shares = counts[:, :-1] / counts[:, -1:].clamp(min=1.0)
            num_null = decision.router_probs.shape[1] - decision.num_experts
            null = shares[:, -1:].expand(-1, num_null) / max(num_null, 1)
            shares = torch.cat([shares[:, :-1], null], dim=1).repeat_interleave(context.token_mask.shape[1], 0)
            candidates = (decision.router_logits > float("-inf")).sum(-1)
            values.append(context.row_mean(candidates * (shares * decision.router_probs).sum(-1)))
        return self.reduce_layers(values) * (1.0 + (self.final_share - 1.0) * context.progress)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.assignments(decisions).items():
            self.add(site, self.row_counts(decision, context).sum(0))
