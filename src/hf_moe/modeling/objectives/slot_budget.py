"""Slot budget: the mean number of real experts per token should be the budget, in the population, not in every row.

    L = (K / K_budget - 1)^2            with K the mean of the soft real slots over the population, per layer

Its gradient is that of `2 (K / K_budget - 1) / K_budget * mean of K_soft`, which is the value of a row here, with K
taken from the previous optimizer step. It is linear in the tokens, and an image may spend what a caption saves:
squares of single rows would force every row to the same budget. Two-sided, so that comparisons happen at equal
compute. Before a step has ended every row is its own population.

Source: the budget of AnyExperts, arXiv:2511.18314, in this library's reading.
"""

import torch
from transformers import initialization as init

from ...configuration.checks import Positive
from ..decisions import Decision, ExpertAssignment
from ..layer_spec import MoELayerSpec, Site, buffer_name
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext
from ..running_statistics import finite, sum_over_ranks


@register_objective("slot_budget")
class SlotBudget(Objective):
    """Holds the mean of the signal `soft_real_slots` at a budget.

    Args:
        specs: the MoE layers of the model.
        coef: coefficient of the loss, >= 0.
        budget: K_budget, > 0; 0.9 times each layer's `num_experts_per_tok` when absent.

    Raises:
        ValueError: in `forward`, if no router reports `soft_real_slots`.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, budget: Positive | None = None):
        super().__init__(specs, coef)
        self.budgets = {spec.site: budget or 0.9 * spec.num_experts_per_tok for spec in specs}
        for spec in specs:
            # The sum of the slots and the number of tokens, which may pass the 2^24 of a float32.
            for name in ("population", "accumulated"):
                self.register_buffer(buffer_name(name, spec.site), torch.zeros(2, dtype=torch.float64))

    def initialize(self, std: float) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)

    def budgeted(self, decisions: dict[Site, Decision]) -> dict[Site, ExpertAssignment]:
        """Return the decisions that report `soft_real_slots`."""
        found = {
            site: decision
            for site, decision in decisions.items()
            if isinstance(decision, ExpertAssignment) and "soft_real_slots" in decision.signals
        }
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
            slots, tokens = self.get_buffer(buffer_name("population", site)).to(own.device).float()
            mean = torch.where(tokens > 0, slots / tokens.clamp(min=1), own.detach())
            budget = self.budgets[site]
            values.append(2.0 * (mean / budget - 1.0) / budget * own)
        return self.reduce_layers(values)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.budgeted(decisions).items():
            slots = decision.signals["soft_real_slots"].detach().double()
            mask = context.tokens("token_mask", slots.device)
            sums = torch.stack([(slots * mask).sum(), mask.sum().double()])
            accumulated = self.get_buffer(buffer_name("accumulated", site))
            # Summed over processes at once: DDP overwrites buffers by those of its first process at every forward.
            accumulated += finite(sum_over_ranks(sums)).to(accumulated)

    def end_step(self) -> None:
        for spec in self.specs:
            population = self.get_buffer(buffer_name("population", spec.site))
            accumulated = self.get_buffer(buffer_name("accumulated", spec.site))
            population.copy_(torch.where(accumulated[1] > 0, accumulated, population))
            accumulated.zero_()
