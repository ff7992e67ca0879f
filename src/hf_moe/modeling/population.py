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
