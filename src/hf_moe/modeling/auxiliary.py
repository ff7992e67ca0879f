"""How objectives enter the loss: one coefficient-weighted value per row, weighted by the row's share of the labels.

    loss = CE_sum / N + sum_r (n_r / N) * A_r,    A_r = sum_o coef_o * A_o[r]

with n_r the labels of row r after the shift and N the labels of the optimizer step (`num_items_in_batch`; the batch's
own labels where absent). This form gives equal router gradients however rows are split over accumulation steps and
processes, with plain `Trainer` as well. A row without labels carries no auxiliary loss.

A loss that is only measured, with gradients off as in `Trainer.evaluate`, is the language loss alone: `eval_loss` then
compares between models of any objectives, and `aux_loss` is returned beside it.

Trainers such as TRL's compute their loss outside of the model, from the log-probability of every label. There the
objectives enter through the gradient of the log-probabilities, whose values stay as they are:

    dL / dA_r = sum over the labels t of row r of |dL / dlogp_t|

so a row's objectives weigh in any loss L as much as its labels do. Of the negative log-likelihood, whatever it is
divided by, that makes the formula above; a loss that pushes some rows down still balances them.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from ..configuration.checks import check
from ..configuration.moe_config import objective_entry
from .decisions import Decision
from .layer_spec import MoELayerSpec, Site
from .mechanisms import get_mechanism
from .registry import build
from .routing import Objective
from .routing_context import RoutingContext


logger = logging.get_logger(__name__)


@dataclass
class AuxiliaryLoss:
    """What the objectives are worth on a batch.

    Attributes:
        values: every objective's own value for each row, (B,), before its coefficient and detached.
        rows (`torch.Tensor` of shape `(B,)`): A_r.
        row_labels (`torch.Tensor` of shape `(B,)`): n_r.
        num_items_in_batch: N.
    """

    values: dict[str, torch.Tensor]
    rows: torch.Tensor
    row_labels: torch.Tensor
    num_items_in_batch: torch.Tensor | int | None = None

    def share(self) -> torch.Tensor:
        """Return every row's share of the labels, n_r / N, (B,)."""
        total = self.row_labels.sum() if self.num_items_in_batch is None else self.num_items_in_batch
        return self.row_labels.float() / torch.as_tensor(total, device=self.row_labels.device).clamp(min=1)

    def total(self) -> torch.Tensor:
        """Return the auxiliary loss, a scalar."""
        return (self.share() * self.rows).sum()

    def totals(self) -> dict[str, torch.Tensor]:
        """Return every objective's own value, a scalar before its coefficient, for logs."""
        return {name: (self.share() * value).sum() for name, value in self.values.items()}

    def add_to(self, output: ModelOutput) -> None:
        """Add the objectives to what a model returns: to its loss, and to the gradient of its log-probabilities."""
        log_probs = output.get("log_probs")
        if log_probs is not None:
            rows = self.rows.to(log_probs.device)
            output.log_probs = _WeighRowsLikeLabels.apply(log_probs, output.label_mask, rows)
        output.loss = self.added_to(output.loss)

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss with the objectives, or as it is where it is only measured."""
        return loss + self.total().to(loss.device) if torch.is_grad_enabled() else loss


class _WeighRowsLikeLabels(torch.autograd.Function):
    """Returns the log-probabilities (B, S) as they are; see the gradient of a row's value above."""

    @staticmethod
    def forward(ctx: Any, log_probs: torch.Tensor, label_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(label_mask)
        return log_probs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (label_mask,) = ctx.saved_tensors
        # A sum over all positions has a gradient where there is no label as well.
        return gradient, None, gradient.abs().masked_fill(~label_mask, 0.0).sum(-1, dtype=torch.float32)


class AuxiliaryLosses(nn.Module):
    """The objectives of a model, `by_name`: by their labels, under which checkpoints know them.

    Args:
        config: the outer `HfMoeConfig`; its `moe_config.objectives` says what an entry looks like. Every objective
            takes `layer_reduction`: `"mean"` over the MoE layers, the default, or `"sum"`, with which the strength
            grows with the depth; and `places`, of `"decoder"`, `"vision"`, `"audio"` and `"connector"`: all of them
            when absent. What it is worth is the sum over its places, each reduced by itself; and `modalities`, such as
            `["image"]`: those of the tokens that it counts, all when absent.
        specs: the MoE layers.

    Raises:
        ValueError: if an entry has another form, its objective is unknown, or refuses its options.
    """

    def __init__(self, config, specs: list[MoELayerSpec]):
        super().__init__()
        self.by_name = nn.ModuleDict()
        for label, value in (config.moe_config.objectives or {}).items():
            name, coef, options = objective_entry(label, value)
            place = f"moe_config.objectives[{label!r}]"
            if hasattr(self.by_name, label):  # `pop` or `training`, say
                raise ValueError(f"{place}: the label is taken, choose another.")
            reduction = options.pop("layer_reduction", "mean")
            check(f"{place}: layer_reduction", reduction, Literal["mean", "sum"])
            own = _specs_at(options.pop("places", None), specs, place)
            modalities = options.pop("modalities", None)
            check(f"{place}: modalities", modalities, list[Literal["text", "image", "video", "audio"]] | None)
            objective = build("objective", get_mechanism("objective", name), options, own, coef)
            if reduction == "sum" and not objective.values_by_layer:
                raise ValueError(
                    f"{place}: {name} has one value for all layers together, and no sum of theirs: leave "
                    "layer_reduction out."
                )
            objective.layer_reduction = reduction
            objective.modalities = modalities
            self.by_name[label] = objective

    @property
    def reads(self) -> frozenset[str]:
        """What the objectives read besides decisions, see [`Objective.reads`]."""
        return frozenset().union(*(objective.reads for objective in self.by_name.values()))

    def forward(
        self,
        context: RoutingContext,
        row_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> AuxiliaryLoss:
        """Return what the objectives are worth, where the rows have the labels n_r (B,) and the optimizer step N."""
        rows, values = torch.zeros_like(row_labels, dtype=torch.float32), {}
        for name, objective in self.by_name.items():
            value = torch.zeros_like(rows)  # (B,)
            read = _read_by(objective, context)
            layers = Counter(part.memory for part, decisions in read for _ in decisions)
            for part, decisions in read:
                # Contexts of some of a place's tokens, and of pieces of them, share its memory: the mean is over all.
                share = 1.0 if objective.layer_reduction == "sum" else len(decisions) / layers[part.memory]
                value = value + share * part.to_batch(objective(decisions, part), len(rows)).to(rows.device)
            values[name] = value.detach()
            rows = rows + objective.coef * value
        return AuxiliaryLoss(values, rows, row_labels, num_items_in_batch)

    def accumulate(self, context: RoutingContext) -> None:
        """Add a micro-batch to the statistics of the current optimizer step."""
        for objective in self.by_name.values():
            for part, decisions in _read_by(objective, context):
                objective.accumulate(decisions, part)

    def end_step(self) -> None:
        """Make the statistics of the finished optimizer step the population of the next one."""
        for objective in self.by_name.values():
            objective.end_step()


def _specs_at(places: Any, specs: list[MoELayerSpec], name: str) -> list[MoELayerSpec]:
    """Return the MoE layers of the places that an entry names, all of them where it names none."""
    if places is None:
        return specs
    known = sorted({spec.place or "decoder" for spec in specs})
    check(f"{name}: places", places, list[str])
    if unknown := set(places) - set(known):
        raise ValueError(f"{name}: places={places} names {sorted(unknown)}, and the model has MoE layers in {known}.")
    return [spec for spec in specs if (spec.place or "decoder") in places]


def _read_by(objective: Objective, context: RoutingContext) -> list[tuple[RoutingContext, dict[Site, Decision]]]:
    """Return the contexts of a forward, and of the decisions in each those at the sites of an objective.

    A part without a decision that it can read is left out, unless it could read none at all, which is its error.
    """
    sites = {spec.site for spec in objective.specs}
    parts = [(part, {s: d for s, d in part.decisions.items() if s in sites}) for part in context.contexts()]
    if objective.modalities is not None:
        parts = [(part.of_modalities(objective.modalities), decisions) for part, decisions in parts]
    parts = [(part, decisions) for part, decisions in parts if decisions]
    readable = [(part, decisions) for part, decisions in parts if any(map(objective.applies_to, decisions.values()))]
    return readable or parts


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return n_r (B,) of the labels (B, S) as the language loss sees them, -100 where masked."""
    return (labels[:, 1:] != -100).sum(-1)


def is_learning(model: nn.Module) -> bool:
    """Whether a forward pass is one that trains: not the generation or the measurement of a model in training mode."""
    return model.training and torch.is_grad_enabled()


def warn_without_labels(names: list[str]) -> None:
    """Say once that a training forward without labels leaves the objectives out."""
    logger.warning_once(
        f"The objectives {', '.join(names)} enter no loss: the model is trained by calls without labels, as label "
        "smoothing and compute_loss_func make them. Give the labels to the model, or leave the objectives out."
    )
