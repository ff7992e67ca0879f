"""The population that a balance loss compares its tokens with."""

import torch
from transformers import initialization as init

from .decisions import Decision, ExpertAssignment
from .layer_spec import MoELayerSpec, Site, buffer_name
from .routing import Objective
from .routing_context import NUM_MODALITIES, RoutingContext
from .running_statistics import sum_over_ranks


class PopulationObjective(Objective):
    """Base of the losses that weigh each token by how loaded its candidates are in the whole population.

    The population of a layer is its slot counts (NUM_MODALITIES, E + 1) of the previous optimizer step, summed over
    micro-batches and processes: one row per sub-population (gate or modality), the last column for empty slots.
    Micro-batches are summed over processes as they come, so that the counts are the same everywhere: DDP broadcasts
    the buffers of its first process at every forward, and only that process saves them.
    """

    # How many slots of a token are counted, from the first; all when absent.
    slots: int | None = None

    def __init__(self, specs: list[MoELayerSpec], coef: float):
        super().__init__(specs, coef)
        for spec in specs:
            zeros = torch.zeros(NUM_MODALITIES, spec.num_experts + 1, dtype=torch.long)
            self.register_buffer(buffer_name("population", spec.site), zeros)
            self.register_buffer(buffer_name("accumulated", spec.site), zeros.clone())

    def initialize(self, std: float) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)

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
        population = self.get_buffer(buffer_name("population", site)).to(own.device)
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
            accumulated = self.get_buffer(buffer_name("accumulated", site))
            accumulated += sum_over_ranks(self.row_counts(decision, context).sum(0)).to(accumulated.device)

    def end_step(self) -> None:
        for spec in self.specs:
            population = self.get_buffer(buffer_name("population", spec.site))
            accumulated = self.get_buffer(buffer_name("accumulated", spec.site))
            population.copy_(torch.where(accumulated.sum(-1, keepdim=True) > 0, accumulated, population))
            accumulated.zero_()
