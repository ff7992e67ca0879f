# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 778dc25f6fb5d870e908a416b0937af2bcba1bc34b99f0573abd152cd450f611
"""Load balance: experts that the population uses much should get little probability.

    value of a row = mean over its real tokens t of  sum_i f_{g(t), i} * C_t * P_{t, i}

P_t is the router's distribution renormalised over the real experts, C_t the number of experts that t may choose, and
f_g the share of the chosen slots of population g that went to expert i (detached). The mean over layers is taken. It
is exactly 1.0 when f or P is uniform over the candidates, and C when all tokens sit on one expert with certainty; it
does not grow with K.

Taking f from the previous optimizer step makes the value linear in the tokens: rows may be split over micro-batches
and processes at will, and domains may specialise within the batch.

Sources: GShard, arXiv:2006.16668; Switch Transformers, arXiv:2101.03961; DeepSeekMoE, arXiv:2401.06066 (groups);
DeepSeek-V3, arXiv:2412.19437 (sequence-wise).
"""

import torch

from .gating import check_choice, renormalise
from .population import PopulationObjective
from .registry import register_objective
from .routing import Decision, ExpertAssignment, MoELayerSpec, RoutingContext


@register_objective("load_balance")
class LoadBalance(PopulationObjective):
    """Balance of expert loads, per layer and per gate.

    Args:
        specs: the MoE layers of the model.
        coef: coefficient of the loss, >= 0.
        scope: `"batch"` balances against the previous optimizer step, `"sequence"` every row by itself.
        per_modality: make every modality a population; otherwise every gate is one.
        expert_groups: balance this many groups of neighbouring experts (the devices of DeepSeekMoE) in place of single
            experts; must divide the number of experts of every layer.

    Raises:
        ValueError: if `scope` is unknown or `expert_groups` does not divide E; in `forward`, if no router gives
            probabilities.
    """

    def __init__(
        self,
        specs: list[MoELayerSpec],
        coef: float,
        *,
        scope: str = "batch",
        per_modality: bool = False,
        expert_groups: int | None = None,
    ):
        super().__init__(specs, coef)
        check_choice("scope", scope, ("batch", "sequence"))
        for spec in specs:
            if expert_groups is not None and (expert_groups < 1 or spec.num_experts % expert_groups):
                raise ValueError(
                    f"expert_groups={expert_groups} must divide num_experts={spec.num_experts} of layer "
                    f"{spec.layer_idx}."
                )
        self.scope = scope
        self.per_modality = per_modality
        self.expert_groups = expert_groups

    def group(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        if self.per_modality:
            return context.tokens("modality_ids", decision.expert_index.device)
        return super().group(decision, context)

    def forward(self, decisions: dict[int, Decision], context: RoutingContext) -> torch.Tensor:
        return self.layer_mean(
            [self.layer_value(layer, decision, context) for layer, decision in self.assignments(decisions).items()]
        )

    def layer_value(self, layer: int, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the value of every row at one layer, (B,)."""
        experts = decision.num_experts
        if self.scope == "sequence":
            counts = self.row_counts(decision, context)
        else:
            counts = self.population_counts(layer, decision, context)
        share = renormalise(counts[..., :experts].float(), minimum=1.0)  # (B, NUM_MODALITIES, E)
        share = self.per_token(share, decision, context)  # (T, E)
        probs = renormalise(decision.router_probs[:, :experts])  # (T, E)
        allowed = decision.router_logits[:, :experts] != float("-inf")  # (T, E)
        if self.expert_groups is not None:
            share, probs = (table.unflatten(-1, (self.expert_groups, -1)).sum(-1) for table in (share, probs))
            allowed = allowed.unflatten(-1, (self.expert_groups, -1)).any(-1)  # (T, groups)
        return context.row_mean((share * probs).sum(-1) * allowed.sum(-1))
