"""Load balance: experts that the population uses much should get little probability.

    value of a row = mean over its real tokens t of  sum_i f_{g(t), i} * C_t * P_{t, i}

P_t is the router's distribution renormalised over the real experts, C_t the number of experts that t may choose, and
f_g the share of the chosen slots of population g that went to expert i (detached). The mean over layers is taken. It
is exactly 1.0 when f or P is uniform over the candidates, and C when all tokens sit on one expert with certainty; it
does not grow with K. With `shares="tokens"` f is the share of the tokens that chose expert i, as in Transformers'
Mixtral: it sums to K, and so the value is K times as large. With `shares="first_choices"` it is the share of the
tokens whose first choice is i, as CuMo counts: the value at collapse is then C for any K.

Every token weighs the same, so a gate weighs as much as it has tokens. With `per_gate` there is one term per gate, as
in MoIIE: the mean over the gate's tokens of the row, and the row's value is their sum. A gate of few tokens is then
balanced as strongly as one of many.

With `expert_groups` f and P are summed over groups of neighbouring experts, as for the devices of DeepSeekMoE. With
`within_groups` the experts are balanced inside of each group: f and P are divided by their sums there, and a token's
value is the mean over the groups that it chose.

With `by_width` f_i is multiplied by h_i / mean(h), h the inner widths of the layer's experts: a wide expert must be
used less than a narrow one to cost the same, which lowers the active parameters. With `shares="tokens"` this is HMoE's
parameter penalty, E sum_i M_i P_i, over mean(h).

Taking f from the previous optimizer step makes the value linear in the tokens: rows may be split over micro-batches
and processes at will, and domains may specialise within the batch.

Sources: GShard, arXiv:2006.16668; Switch Transformers, arXiv:2101.03961; DeepSeekMoE, arXiv:2401.06066 (groups);
DeepSeek-V3, arXiv:2412.19437 (sequence-wise); CuMo, arXiv:2405.05949 (first choices); HMoE, arXiv:2408.10681 (widths).
"""

from itertools import groupby
from typing import Literal

import torch
from torch.nn import functional as F

from ...configuration.checks import PositiveInt
from ..decisions import Decision, ExpertAssignment
from ..gating import renormalise
from ..layer_spec import MoELayerSpec, Site
from ..population import PopulationObjective
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("load_balance")
class LoadBalance(PopulationObjective):
    """Balance of expert loads, per layer and per gate.

    Args:
        scope: `"batch"` balances against the previous optimizer step, `"sequence"` every row by itself.
        per_modality: make every modality a population; otherwise every gate is one.
        per_gate: one term per population, as above.
        shares: `"slots"`, `"tokens"` or `"first_choices"`, of which f is the share.
        expert_groups: balance this many groups of neighbouring experts (the devices of DeepSeekMoE) in place of single
            experts; must divide the number of experts of every layer.
        within_groups: balance the experts inside of each of this many groups of neighbours; must divide E too.
        by_width: weigh the share of every expert by its width, for banks of experts of unequal width.

    Raises:
        ValueError: if both kinds of groups are given, or a number of groups does not divide E; in `forward`, if no
            router gives probabilities.
    """

    def __init__(
        self,
        specs: list[MoELayerSpec],
        coef: float,
        *,
        scope: Literal["batch", "sequence"] = "batch",
        per_modality: bool = False,
        per_gate: bool = False,
        shares: Literal["slots", "tokens", "first_choices"] = "slots",
        expert_groups: PositiveInt | None = None,
        within_groups: PositiveInt | None = None,
        by_width: bool = False,
    ):
        super().__init__(specs, coef)
        groups = {"expert_groups": expert_groups, "within_groups": within_groups}
        given = {name: number for name, number in groups.items() if number is not None}
        if len(given) > 1:
            raise ValueError(f"{groups}: one entry balances groups or within them; give two entries, with labels.")
        for name, number in given.items():
            for spec in specs:
                if spec.num_experts % number:
                    raise ValueError(
                        f"{name}={number} must divide num_experts={spec.num_experts} of layer {spec.layer_idx}."
                    )
        self.scope = scope
        self.per_modality = per_modality
        self.per_gate = per_gate
        self.share_of = shares
        self.slots = 1 if shares == "first_choices" else None
        self.expert_groups = expert_groups
        self.within_groups = within_groups
        self.widths = {spec.site: spec.expert_widths for spec in specs} if by_width else {}

    def group(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        if self.per_modality:
            return context.tokens("modality_ids", decision.expert_index.device)
        return super().group(decision, context)

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        return self.reduce_layers(
            [self.layer_value(site, decision, context) for site, decision in self.assignments(decisions).items()]
        )

    def layer_value(self, site: Site, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the value of every row at one layer, (B,)."""
        experts = decision.num_experts
        if self.scope == "sequence":
            counts = self.row_counts(decision, context)
        else:
            counts = self.population_counts(site, decision, context)
        if self.share_of != "tokens":
            counts = counts[..., :experts]  # empty slots were chosen by nobody
        share = self.shares(counts, decision, self.share_of)[..., :experts]  # (B, NUM_MODALITIES, E)
        if self.widths:
            share = share * relative_widths(self.widths[site], share.device)
        share = self.per_token(share, decision, context)  # (T, E)
        probs = decision.expert_probs  # (T, E)
        allowed = decision.router_logits[:, :experts] != float("-inf")  # (T, E)
        if self.expert_groups is not None:
            share, probs = (table.unflatten(-1, (self.expert_groups, -1)).sum(-1) for table in (share, probs))
            allowed = allowed.unflatten(-1, (self.expert_groups, -1)).any(-1)  # (T, groups)
        if self.within_groups is not None:
            value = self.value_within(self.within_groups, decision, share, probs, allowed)
        else:
            value = (share * probs).sum(-1) * allowed.sum(-1)  # (T,)
        if self.per_gate:
            of_gate = self.row_counts(decision, context).sum(-1, keepdim=True)  # (B, NUM_MODALITIES, 1)
            weight = of_gate.sum(1, keepdim=True) / of_gate.clamp(min=1)
            value = value * self.per_token(weight, decision, context).squeeze(-1)
        return context.row_mean(value)

    def value_within(
        self, groups: int, decision: ExpertAssignment, share: torch.Tensor, probs: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """Return the value (T,) of the balance inside of the groups, from tables (T, E)."""
        share, probs, allowed = (table.unflatten(-1, (groups, -1)) for table in (share, probs, allowed))  # (T, G, M)
        value = (renormalise(share) * renormalise(probs)).sum(-1) * allowed.sum(-1)  # (T, G)
        group = decision.expert_index // share.shape[-1]  # (T, K), G at empty slots
        chosen = F.one_hot(group, groups + 1).amax(1)[:, :groups]  # (T, G)
        return (value * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)


def relative_widths(widths: list[int], device: torch.device) -> torch.Tensor:
    """Return the widths of experts over their mean, (E,).

    Filled in run by run on the device: a tensor made of the list would be copied there at every call.
    """
    mean = sum(widths) / len(widths)
    runs = [(width / mean, len(list(run))) for width, run in groupby(widths)]
    return torch.cat([torch.full((number,), share, device=device) for share, number in runs])
