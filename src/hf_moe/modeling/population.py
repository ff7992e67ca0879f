"""The statistics of the previous optimizer step that losses compare their tokens with."""

from collections.abc import Callable

import torch
from transformers import initialization as init

from .decisions import Decision, ExpertAssignment
from .layer_spec import MoELayerSpec, Site, buffer_name
from .routing import Objective
from .routing_context import NUM_MODALITIES, RoutingContext
from .running_statistics import finite, sum_over_ranks


class StatisticObjective(Objective):
    """Base of the losses that read a statistic of the previous optimizer step, one tensor for every site.

    It is a sum over micro-batches and processes. Micro-batches are summed over processes as they come, so that the
    sums are the same everywhere: DDP broadcasts the buffers of its first process at every forward, and only that
    process saves them.
    """

    def keep(self, zeros: Callable[[MoELayerSpec], torch.Tensor]) -> None:
        """Keep a statistic of the shape and type that `zeros` gives for a site."""
        for spec in self.specs:
            for name in ("population", "accumulated"):
                self.register_buffer(buffer_name(name, spec.site), zeros(spec))

    def initialize(self, std: float) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)

    def population(self, site: Site, device: torch.device) -> torch.Tensor:
        """Return the statistic of a site; zeros before a step has ended."""
        return self.get_buffer(buffer_name("population", site)).to(device)

    def add(self, site: Site, sums: torch.Tensor) -> None:
        """Add the sums of a micro-batch to the statistic of the current step."""
        accumulated = self.get_buffer(buffer_name("accumulated", site))
        accumulated += finite(sum_over_ranks(sums)).to(accumulated)

    def seen(self, accumulated: torch.Tensor) -> torch.Tensor:
        """Return which of the sums have seen a token; the others keep those of an earlier step."""
        return accumulated.sum() > 0

    def end_step(self) -> None:
        for spec in self.specs:
            population, accumulated = (
                self.get_buffer(buffer_name(name, spec.site)) for name in ("population", "accumulated")
            )
            population.copy_(torch.where(self.seen(accumulated), accumulated, population))
            accumulated.zero_()


class PopulationObjective(StatisticObjective):
    """Base of the losses that weigh each token by how loaded its candidates are in the whole population.

    The population of a layer is its slot counts (NUM_MODALITIES, E + 1) of the previous optimizer step: one row per
    sub-population (gate or modality), the last column for empty slots.
    """

    # How many slots of a token are counted, from the first; all when absent.
    slots: int | None = None

    def __init__(self, specs: list[MoELayerSpec], coef: float):
        super().__init__(specs, coef)
        self.keep(lambda spec: torch.zeros(NUM_MODALITIES, spec.num_experts + 1, dtype=torch.long))

    def seen(self, accumulated: torch.Tensor) -> torch.Tensor:
        return accumulated.sum(-1, keepdim=True) > 0

    def group(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the sub-population (T,) of every token: the gate that decided, or 0 where there is one gate."""
        if decision.gate_index is not None:
            return decision.gate_index
        return torch.zeros_like(decision.expert_index[:, 0])

    def row_counts(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the slot counts of every row, (B, NUM_MODALITIES, E + 1)."""
        mask = context.tokens("token_mask", decision.expert_index.device)
        rows, positions = context.token_mask.shape
        row = torch.arange(rows, device=mask.device).repeat_interleave(positions)  # (T,)
        cell = row * NUM_MODALITIES + self.group(decision, context)
        return decision.slot_table(cell, rows * NUM_MODALITIES, mask, self.slots).view(rows, NUM_MODALITIES, -1)

    def population_counts(self, site: Site, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the counts that apply in every row, (B, NUM_MODALITIES, E + 1).

        A sub-population that no finished step has seen yet is replaced by the row's own tokens.
        """
        own = self.row_counts(decision, context)
        population = self.population(site, own.device)
        return torch.where(population.sum(-1, keepdim=True) > 0, population, own)

    def shares(self, counts: torch.Tensor, decision: ExpertAssignment, of: str) -> torch.Tensor:
        """Return counts (..., E + 1) as shares, float32: of all `"slots"`, summing to 1, or of the `"tokens"`, summing
        to the slots of a token."""
        total = counts.sum(-1, keepdim=True)
        if of == "tokens":
            total = total / decision.expert_index.shape[-1]
        return counts.float() / total.clamp(min=1)

    def per_token(self, table: torch.Tensor, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Pick the row of `table` (B, NUM_MODALITIES, C) that belongs to every token, (T, C)."""
        rows, positions = context.token_mask.shape
        group = self.group(decision, context).view(rows, positions, 1).expand(-1, -1, table.shape[-1])
        return table.gather(1, group).flatten(0, 1)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.assignments(decisions).items():
            self.add(site, self.row_counts(decision, context).sum(0))


class PopulationMean(StatisticObjective):
    """Base of the losses on the mean routing distribution m_g of every group g of tokens: a penalty on the means.

    m_g is that of the previous optimizer step, of the distributions over the real experts; a group that the step did
    not hold keeps its mean of an earlier one. Every row has the value `penalty(m)`, and a token P_t in it the gradient
    that it would have in that population:

        d value / d P_t = (d penalty / d m_g) * N / (N_g * tokens of the row)        N_g of the N tokens are of group g

    This is linear in the tokens, and over all rows the gradient of the penalty. Before a step has ended no group is
    present.

    Args:
        num_groups: G: one for each modality, 1 for all tokens together, or as many as an own `group` tells apart.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, num_groups: int = NUM_MODALITIES):
        super().__init__(specs, coef)
        self.num_groups = num_groups
        # By group the sums of the probabilities and, last, the number of tokens, which may pass the 2^24 of a float32.
        self.keep(lambda spec: torch.zeros(num_groups, spec.num_experts + 1, dtype=torch.float64))

    def penalty(self, mean: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Return the loss (B,) of the means (B, G, E) of the groups that are `present` (G,); the others are 0."""
        raise NotImplementedError(f"{type(self).__name__} must define penalty(mean, present).")

    def group(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the group (T,) of every token."""
        if self.num_groups == 1:
            return torch.zeros_like(decision.expert_index[:, 0])
        return context.tokens("modality_ids", decision.expert_index.device)

    def seen(self, accumulated: torch.Tensor) -> torch.Tensor:
        return accumulated[:, -1:] > 0

    def row_sums(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        """Return the sums of the probabilities of every row and, last, its tokens, by group, (B, G, E + 1)."""
        probs = decision.expert_probs  # (T, E)
        counted = torch.cat([probs, torch.ones_like(probs[:, :1])], dim=-1)
        counted = counted.masked_fill(~context.tokens("token_mask", probs.device)[:, None], 0.0)
        rows, positions = context.token_mask.shape
        row = torch.arange(rows, device=probs.device).repeat_interleave(positions)  # (T,)
        cell = row * self.num_groups + self.group(decision, context)
        table = counted.new_zeros(rows * self.num_groups, counted.shape[-1])
        return table.index_add(0, cell, counted).view(rows, self.num_groups, -1)

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.assignments(decisions).items():
            own = self.row_sums(decision, context)  # (B, G, E + 1)
            population = self.population(site, own.device)
            count = population[:, -1:]  # (G, 1)
            mean = (population[:, :-1] / count.clamp(min=1)).float()
            weight = (count.sum() / count.clamp(min=1)).float()
            tokens = own[..., -1].sum(-1).clamp(min=1)  # (B,)
            moved = own[..., :-1] * weight / tokens[:, None, None]
            values.append(self.penalty(mean + (moved - moved.detach()), count[:, 0] > 0))
        return self.reduce_layers(values)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        for site, decision in self.assignments(decisions).items():
            self.add(site, self.row_sums(decision, context).detach().sum(0))
