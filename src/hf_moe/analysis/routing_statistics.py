"""What a model's routers did: slot counts by layer, modality and expert, and the figures read off them."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from ..configuration.configuration_hf_moe import MODALITIES
from ..hub.active_parameters import count_active, unwrapped_experts
from ..modeling.block import Block
from ..modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture
from ..modeling.dispatch import out_of_order
from ..modeling.layer_spec import Site
from ..modeling.routing_context import NUM_MODALITIES, RoutingContext


LAYER_GROUPS = ("early", "middle", "late")


class RoutingStatistics:
    """Counts of the slots that real tokens used, summed over any number of forward passes.

    Attributes:
        tables: site -> (NUM_MODALITIES, E + 1) int64; the last column counts empty slots.
        mixtures: site -> (NUM_MODALITIES, E) float64, how often experts ran where they are mixed instead of chosen: a
            merged expert once per token, in the shares of its parts; a slot once, in the shares of its tokens.
        tokens: site -> (NUM_MODALITIES,) int64 real tokens.
        signals: site -> name -> (NUM_MODALITIES,) float64, a router's signal summed over real tokens.
        slot_histograms: site -> (NUM_MODALITIES, most slots + 1) int64, the tokens by their number of slots, of
            routers that report `slots`.
        seen: (NUM_MODALITIES,) int64 real tokens that the decoder saw.
    """

    def __init__(self) -> None:
        self.tables: dict[Site, torch.Tensor] = {}
        self.mixtures: dict[Site, torch.Tensor] = {}
        self.tokens: dict[Site, torch.Tensor] = {}
        self.signals: dict[Site, dict[str, torch.Tensor]] = {}
        self.slot_histograms: dict[Site, torch.Tensor] = {}
        self.seen = torch.zeros(NUM_MODALITIES, dtype=torch.int64)

    def update(self, context: RoutingContext) -> None:
        """Add the decisions of one forward pass."""
        real = context.modality_ids[context.token_mask]
        self.seen += torch.bincount(real, minlength=NUM_MODALITIES).cpu()
        for part in context.contexts():
            for site, decision in part.decisions.items():
                if isinstance(decision, ExpertAssignment):
                    self._add(site, decision, part)
                else:
                    self._add_mixture(site, decision, part)

    def _add(self, site: Site, decision: ExpertAssignment, context: RoutingContext) -> None:
        device = decision.expert_index.device
        modality = context.tokens("modality_ids", device)
        mask = context.tokens("token_mask", device)
        # What has run: a balance loss may count other choices.
        ran = replace(decision, chosen_index=None)
        table = ran.slot_table(modality, NUM_MODALITIES, mask).cpu()
        modality = modality[mask]
        self.tables[site] = self.tables.get(site, 0) + table
        self.tokens[site] = self.tokens.get(site, 0) + torch.bincount(modality, minlength=NUM_MODALITIES).cpu()
        sums = self.signals.setdefault(site, {})
        for name, values in decision.signals.items():
            total = torch.zeros(NUM_MODALITIES, dtype=torch.float64, device=device)
            total.index_add_(0, modality, values.detach().double()[mask])
            sums[name] = sums.get(name, 0) + total.cpu()
        if "slots" in decision.signals:
            slots = decision.signals["slots"][mask].round().long()
            width = int(slots.max()) + 1 if slots.numel() else 1
            cell = modality * width + slots
            counts = torch.bincount(cell, minlength=NUM_MODALITIES * width).view(NUM_MODALITIES, width).cpu()
            known = self.slot_histograms.get(site, counts[:, :0])
            widest = max(width, known.shape[1])
            counts, known = (F.pad(part, (0, widest - part.shape[1])) for part in (counts, known))
            self.slot_histograms[site] = counts + known

    def _add_mixture(self, site: Site, decision: SlotMixture | ParameterMixture, context: RoutingContext) -> None:
        if isinstance(decision, SlotMixture):
            places = decision.dispatch.detach().flatten(0, 1)
            slots = out_of_order(places, decision.order, context.token_mask.numel())  # (T, E * slots)
            runs = slots.unflatten(-1, (decision.num_experts, -1)).sum(-1)  # (T, E)
        else:
            # One merged expert, of which some may be taken away.
            shares = decision.expert_weight.detach().abs()
            runs = (shares / shares.sum(-1, keepdim=True).clamp(min=1e-12))[decision.group_index]  # (T, E)
        mask = context.tokens("token_mask", runs.device)
        modality = context.tokens("modality_ids", runs.device)[mask]
        total = torch.zeros(NUM_MODALITIES, decision.num_experts, dtype=torch.float64, device=runs.device)
        total.index_add_(0, modality, runs.double()[mask])
        self.mixtures[site] = self.mixtures.get(site, 0) + total.cpu()
        self.tokens[site] = self.tokens.get(site, 0) + torch.bincount(modality, minlength=NUM_MODALITIES).cpu()

    def runs(self, site: Site) -> torch.Tensor:
        """Return how often every expert ran for the tokens of each modality, (NUM_MODALITIES, E) float64."""
        return self.tables[site][:, :-1].double() if site in self.tables else self.mixtures[site]

    def signal_means(self, site: Site, name: str) -> torch.Tensor:
        """Return the mean of a signal over the tokens of each modality, (NUM_MODALITIES,) float64."""
        return self.signals[site][name] / self.tokens[site].clamp(min=1)

    def shares(self, site: Site) -> torch.Tensor:
        """Return each expert's share of the runs, (NUM_MODALITIES, E) float32; rows without any are 0."""
        runs = self.runs(site)
        return (runs / runs.sum(-1, keepdim=True).clamp(min=1e-12)).float()

    def active_experts(self, site: Site) -> torch.Tensor:
        """Return the mean number of experts that run for a token, (NUM_MODALITIES,) float32."""
        return self.runs(site).sum(-1).float() / self.tokens[site].clamp(min=1)

    def entropy(self, site: Site) -> torch.Tensor:
        """Return the entropy of the expert shares over log E, (NUM_MODALITIES,) float32 in 0..1."""
        shares = self.shares(site)
        return torch.special.entr(shares).sum(-1) / math.log(max(shares.shape[1], 2))

    def figures(self) -> dict[str, float]:
        """Return a small fixed set of figures per modality and third of the MoE layers.

        `active` is the mean number of experts of a token, `entropy` that of the expert shares over log E, in 0..1,
        `largest` the largest share of an expert, `empty` the share of empty slots; a router's signals are their means.
        A modality without tokens has none.
        """
        sites = list(self.tables)
        figures = {}
        for group_index, group in enumerate(LAYER_GROUPS):
            chosen = [site for rank, site in enumerate(sites) if rank * len(LAYER_GROUPS) // len(sites) == group_index]
            for modality, name in enumerate(MODALITIES):
                rows = [self._row(site, modality) for site in chosen if self.tokens[site][modality] > 0]
                for key in rows[0] if rows else ():
                    values = [row[key] for row in rows if key in row]
                    figures[f"{name}/{group}/{key}"] = sum(values) / len(values)
        return figures

    def _row(self, site: Site, modality: int) -> dict[str, float]:
        table = self.tables[site][modality].float()
        return {
            "active": self.active_experts(site)[modality].item(),
            "entropy": self.entropy(site)[modality].item(),
            "largest": self.shares(site)[modality].max().item(),
            "empty": (table[-1] / table.sum().clamp(min=1)).item(),
            **{name: self.signal_means(site, name)[modality].item() for name in self.signals.get(site, {})},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain data, for a report."""
        return {
            str(site): {
                name: {
                    "tokens": int(self.tokens[site][row]),
                    "slots": self.tables[site][row].tolist(),
                    "signals": {key: self.signal_means(site, key)[row].item() for key in self.signals.get(site, {})},
                }
                for row, name in enumerate(MODALITIES)
                if self.tokens[site][row] > 0
            }
            for site in self.tables
        }


class MeanUse:
    """The use of an average token of a modality, by what routers did."""

    def __init__(self, statistics: RoutingStatistics, modality: int):
        self.statistics = statistics
        self.modality = modality

    def experts(self, site: Site) -> float:
        return float(self.statistics.active_experts(site)[self.modality])

    def routed(self, block: Block, number: int) -> float:
        statistics, row, router = self.statistics, self.modality, block.routers[number]
        experts, site = unwrapped_experts(block, number), router.spec.site
        # All tokens come to the first router of a block, and some of them to the others.
        tokens = float(statistics.tokens[block.router.spec.site][row].clamp(min=1))
        here = float(statistics.tokens[site][row])
        sizes = torch.tensor(experts.parameters_per_run(), dtype=torch.float64)
        used = float((statistics.runs(site)[row] * sizes).sum()) + here * experts.parameters_per_token()
        for signal, part in experts.beside().items():
            counted = signal in statistics.signals.get(site, {})
            runs = float(statistics.signal_means(site, signal)[row]) if counted else part.num_experts
            used += here * runs * part.parameters_per_run()[0]
        return used / tokens


def active_parameters(model: torch.nn.Module, statistics: RoutingStatistics) -> dict[str, int]:
    """Return the decoder parameters that work on an average token of each modality the statistics saw.

    See [`count_active`]. An expert counts by the share of tokens that used it, merged experts as one, and parts beside
    the experts by the signal that tells their runs, or else in full.
    """
    return {
        name: count_active(model, MeanUse(statistics, row))
        for row, name in enumerate(MODALITIES)
        if statistics.seen[row] > 0
    }
