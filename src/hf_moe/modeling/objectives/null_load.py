"""Null load: holds the share of the slots that go to null experts, without balancing the null experts themselves.

    value of a row = mean over its real tokens t of  (E + M) * sum_{i < E + M} f~_i * P_{t, i}

P_t is the router's distribution over E real and M null experts. f~_i is the share of the slots that went to real
expert i; each null expert has the mean share of all null ones, so that it does not matter which of them a slot went
to. The shares come from the previous optimizer step (detached), the mean over layers is taken, and the value is 1.0 at
uniform. It pushes the mean number of real experts per token towards K E / (E + M).

The paper's shares are of the tokens and sum to K, which makes the value K times as large: `shares="tokens"`.

Source: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, arXiv:2406.13233.
"""

import torch

from ..decisions import Decision
from ..gating import check_choice
from ..layer_spec import MoELayerSpec, Site
from ..population import PopulationObjective
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("null_load")
class NullLoad(PopulationObjective):
    """Balance over real experts and the whole of the null ones, for routers with null experts.

    Args:
        shares: `"slots"` or `"tokens"`, of which f is the share.

    Raises:
        ValueError: if `shares` is unknown; in `forward`, if no router has null experts.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, shares: str = "slots"):
        super().__init__(specs, coef)
        check_choice("shares", shares, ("slots", "tokens"))
        self.share_of = shares

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.assignments(decisions).items():
            candidates = decision.router_probs.shape[-1]
            num_null = candidates - decision.num_experts
            if num_null == 0:
                continue
            counts = self.population_counts(site, decision, context)
            share = self.shares(counts, decision, self.share_of)  # (B, NUM_MODALITIES, E + 1)
            nulls = (share[..., -1:] / num_null).expand(*share.shape[:-1], num_null)
            share = torch.cat([share[..., :-1], nulls], dim=-1)  # (B, NUM_MODALITIES, E + M)
            share = self.per_token(share, decision, context)  # (T, E + M)
            values.append(context.row_mean((share * decision.router_probs).sum(-1) * candidates))
        if not values:
            raise ValueError(
                f"null_load needs a router with null experts, such as 'adamoe'; the routers of layers "
                f"{list(decisions)} have none: use load_balance."
            )
        return self.reduce_layers(values)
