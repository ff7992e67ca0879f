"""How objectives enter the loss: one coefficient-weighted value per row, weighted by the row's share of the labels.

    loss = CE_sum / N + sum_r (n_r / N) * sum_o coef_o * A_o[r]

with n_r the labels of row r after the shift and N the labels of the optimizer step (`num_items_in_batch`; the batch's
own labels where absent). This form gives equal router gradients however rows are split over accumulation steps and
processes, with plain `Trainer` as well. A row without labels carries no auxiliary loss.
"""

import torch
from torch import nn

from .mechanisms import get_mechanism
from .registry import build
from .routing import MoELayerSpec, RoutingContext


class AuxiliaryLosses(nn.Module):
    """The objectives of a model, by name.

    Args:
        config: the outer `HfMoeConfig`; `moe_config.objectives` maps names to a coefficient or to a dict with the key
            `coef` and options.
        specs: the MoE layers.
    """

    def __init__(self, config, specs: list[MoELayerSpec]):
        super().__init__()
        self.by_name = nn.ModuleDict()
        for name, value in config.moe_config.objectives.items():
            options = dict(value) if isinstance(value, dict) else {"coef": value}
            if "coef" not in options:
                raise ValueError(f"moe_config.objectives[{name!r}] needs a coefficient under 'coef', got {value!r}.")
            coef = options.pop("coef")
            self.by_name[name] = build("objective", get_mechanism("objective", name), options, specs, coef)

    @property
    def reads_outputs(self) -> bool:
        """Whether an objective reads what the experts put out."""
        return any(objective.reads_outputs for objective in self.by_name.values())

    def forward(
        self, context: RoutingContext, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the auxiliary loss, a scalar, and every objective's own value before its coefficient, for logs.

        Args:
            context: the context of the forward, with its decisions.
            labels (`torch.Tensor` of shape `(B, S)`): as the language loss sees them, -100 where masked.
            num_items_in_batch: N.
        """
        row_labels = (labels[:, 1:] != -100).sum(-1)  # (B,)
        total = row_labels.sum() if num_items_in_batch is None else num_items_in_batch
        share = row_labels.float() / torch.as_tensor(total, device=labels.device).clamp(min=1)  # (B,)
        loss, values = share.new_zeros(()), {}
        for name, objective in self.by_name.items():
            per_row = objective(context.decisions, context).to(share.device)  # (B,)
            value = (share * per_row).sum()
            values[name] = value.detach()
            loss = loss + objective.coef * value
            if self.training:
                objective.accumulate(context.decisions, context)
        return loss, values

    def end_step(self) -> None:
        """Make the statistics of the finished optimizer step the population of the next one."""
        for objective in self.by_name.values():
            objective.end_step()
