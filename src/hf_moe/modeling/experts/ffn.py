"""Feed-forward experts: the experts of almost every published system.

    gated:  y = W_down (act(W_gate x) * (W_up x))        plain:  y = W_down act(W_up x)

each projection with or without a bias, and the gated unit bounded where the host's is (`clamped_unit.py`). How they
are stored, `stacked_experts.py` tells.
"""

from typing import Annotated, Literal

import torch
from torch import nn

from ...configuration.checks import Interval, Positive
from ..clamped_unit import ClampedUnit
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..stacked_experts import StackedExperts


@register_experts("ffn")
class FfnExperts(StackedExperts):
    """One bank of feed-forward experts of one width.

    Args:
        dropout: expert dropout: while training, the share of an expert's inner neurons that is dropped per token.
        limit: bounds what a gated expert multiplies, see [`ClampedUnit`]; `None` bounds nothing.
        shared_limit: the same for the shared branch.
        order: whether the gate is clamped `"before"` its activation or `"after"` it.
        alpha: takes the place of the host's activation, see [`ClampedUnit`].

    Raises:
        ValueError: if experts without a gate are to be clamped, or `alpha` is given with `dropout`.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        dropout: Annotated[float, Interval(0, 1, open_maximum=True)] = 0.0,
        limit: Positive | None = None,
        shared_limit: Positive | None = None,
        order: Literal["before", "after"] = "before",
        alpha: Positive | None = None,
    ):
        super().__init__(config, spec)
        clamped = any(value is not None for value in (limit, shared_limit, alpha))
        if clamped and not spec.gated:
            raise ValueError(
                f"Layer {spec.layer_idx}: limit, shared_limit and alpha are of experts with a gate, and the "
                "feed-forward of this host has none: leave them out."
            )
        if alpha is not None and dropout > 0.0:
            raise ValueError(
                "Expert dropout acts behind the activation, whose place alpha takes: leave one of them out."
            )
        self.unit = ClampedUnit(limit, order, alpha)
        self.shared_unit = ClampedUnit(shared_limit, order, alpha)
        if dropout > 0.0:
            # The activation is the one step that every backend takes through this module.
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(dropout))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.unit(self.act_fn, *gate_up.chunk(2, dim=-1))
