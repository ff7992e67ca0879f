"""Condition information: experts specialise in conditions (domains, tasks, languages) and may still share them.

    value of a row = - mean over its real tokens t of  sum_i P_{t, i} log( p(c, i) / (p(c) p(i)) )

P_t is the router's distribution over the experts, c the condition of the row, and p(c, i) the mean of P over the
tokens of the previous optimizer step, by condition and expert (detached). At the population itself the value is minus
the mutual information of condition and expert, and so is its gradient; the mean over layers is taken. Until a step has
been seen, and for a condition that the last step did not hold, the value is 0.

Source: BECoTTA: Input-dependent Online Blending of Experts for Continual Test-time Adaptation, arXiv:2402.08712.
"""

import torch

from ...configuration.checks import PositiveInt
from ..decisions import Decision
from ..layer_spec import MoELayerSpec, Site
from ..population import StatisticObjective
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("condition_information")
class ConditionInformation(StatisticObjective):
    """Minus the mutual information of condition and expert; the paper's coefficient is 0.0005.

    Args:
        condition: name of the ids in `condition_ids`.
        num_conditions: how many values they have.

    Raises:
        ValueError: in `forward`, if the call gave no such ids, or no router gives probabilities.
    """

    def __init__(
        self, specs: list[MoELayerSpec], coef: float, *, condition: str = "domain", num_conditions: PositiveInt = 4
    ):
        super().__init__(specs, coef)
        self.condition = condition
        self.num_conditions = num_conditions
        self.keep(lambda spec: torch.zeros(num_conditions, spec.num_experts, dtype=torch.float32))

    def conditions(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the condition of every row, (B,)."""
        ids = context.condition_ids.get(self.condition)
        if ids is None:
            raise ValueError(
                f"condition_information reads the condition {self.condition!r} of every row, and the call gave none: "
                f"pass condition_ids={{{self.condition!r}: (B,)}}, or remove this objective."
            )
        return ids.long().to(device)

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.assignments(decisions).items():
            probs = decision.expert_probs  # (T, E)
            table = self.population(site, probs.device)
            joint = table / table.sum().clamp(min=1e-20)
            independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
            ratio = torch.where(joint > 0, (joint / independent.clamp(min=1e-20)).clamp(min=1e-6).log(), 0.0)
            per_row = ratio[self.conditions(context, probs.device)]  # (B, E)
            per_token = per_row.repeat_interleave(context.token_mask.shape[1], dim=0)  # (T, E)
            values.append(-context.row_mean((probs * per_token).sum(-1)))
        return self.reduce_layers(values)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.assignments(decisions).items():
            probs = decision.expert_probs.detach()
            mask = context.token_mask.to(probs.device)
            per_row = probs.view(*mask.shape, -1).masked_fill(~mask[..., None], 0.0).sum(1)  # (B, E)
            table = per_row.new_zeros(self.num_conditions, decision.num_experts)
            self.add(site, table.index_add(0, self.conditions(context, probs.device), per_row))
