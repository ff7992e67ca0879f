"""Slot budget: the mean number of real experts per token should be the budget, in the population, not in every row.

    L = (K / K_budget - 1)^2            with K the mean of the soft real slots over the population, per layer

Its gradient is that of `2 (K / K_budget - 1) / K_budget * mean of K_soft`, which is the value of a row here, with K
taken from the previous optimizer step. It is linear in the tokens, and an image may spend what a caption saves:
squares of single rows would force every row to the same budget. Two-sided, so that comparisons happen at equal
compute. Before a step has ended every row is its own population.

Source: the budget of AnyExperts, arXiv:2511.18314, in this library's reading.
"""

import torch

from ...configuration.checks import Positive
from ..decisions import Decision, ExpertAssignment
from ..layer_spec import MoELayerSpec, Site
from ..population import StatisticObjective
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("slot_budget")
class SlotBudget(StatisticObjective):
    """Holds the mean of the signal `soft_real_slots` at a budget.

    Args:
        budget: K_budget, > 0; 0.9 times each layer's `num_experts_per_tok` when absent.

    Raises:
        ValueError: in `forward`, if no router reports `soft_real_slots`.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, budget: Positive | None = None):
        super().__init__(specs, coef)
        self.budgets = {spec.site: budget or 0.9 * spec.num_experts_per_tok for spec in specs}
        # The sum of the slots and the number of tokens, which may pass the 2^24 of a float32.
        self.keep(lambda spec: torch.zeros(2, dtype=torch.float64))

    def applies_to(self, decision: Decision) -> bool:
        return isinstance(decision, ExpertAssignment) and "soft_real_slots" in decision.signals

    def budgeted(self, decisions: dict[Site, Decision]) -> dict[Site, Decision]:
        """Return the decisions that report `soft_real_slots`."""
        found = {site: decision for site, decision in decisions.items() if self.applies_to(decision)}
        if not found:
            raise ValueError(
                "The objective 'slot_budget' needs a router with a slot budget, such as 'anyexperts': remove it from "
                "moe_config.objectives."
            )
        return found

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.budgeted(decisions).items():
            own = context.row_mean(decision.signals["soft_real_slots"])  # (B,)
            slots, tokens = self.population(site, own.device).float()
            mean = torch.where(tokens > 0, slots / tokens.clamp(min=1), own.detach())
            budget = self.budgets[site]
            values.append(2.0 * (mean / budget - 1.0) / budget * own)
        return self.reduce_layers(values)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.budgeted(decisions).items():
            slots = decision.signals["soft_real_slots"].detach().double()
            mask = context.tokens("token_mask", slots.device)
            self.add(site, torch.stack([(slots * mask).sum(), mask.sum().double()]))
