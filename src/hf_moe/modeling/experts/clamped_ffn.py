"""Feed-forward experts whose gated unit is clamped, as in large models that are trained in low precision.

    order "before"    y = W_down (act(min(W_gate x, L)) * clip(W_up x, -L, L))
    order "after"     y = W_down (min(act(W_gate x), L) * clip(W_up x, -L, L))
    with alpha        act(g) = g sigmoid(alpha g), and the up projection counts one more: clip(W_up x, -L, L) + 1

A shared branch takes the same unit with a limit of its own.

Sources: Transformers' `glm5_next` and `hy_v4_vl` (before), `step3p7` (after), `minimax_m3_vl` (alpha, as in GPT-OSS).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.activations import ACT2FN

from ...configuration.checks import Positive
from ..registry import register_experts
from ..routing import MoELayerSpec
from .ffn import FfnExperts


@dataclass(frozen=True)
class ClampedUnit:
    """Joins a gate and an up projection of the same shape, see above."""

    activation: str
    limit: float | None
    order: str
    alpha: float | None

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        limit = math.inf if self.limit is None else self.limit
        if self.order == "before":
            gate = gate.clamp(max=limit)
        gate = ACT2FN[self.activation](gate) if self.alpha is None else gate * torch.sigmoid(self.alpha * gate)
        if self.order == "after":
            gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return gate * (up if self.alpha is None else up + 1.0)


@register_experts("clamped_ffn")
class ClampedFfnExperts(FfnExperts):
    """One bank of gated feed-forward experts with a clamped unit.

    Args:
        config, spec: see [`FfnExperts`].
        limit: L of the routed experts; `None` clamps nothing.
        shared_limit: L of the shared branch.
        order: whether the gate is clamped `"before"` its activation or `"after"` it.
        alpha: takes the place of the host's activation, see above.

    Raises:
        ValueError: if the host's feed-forward has no gate.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        limit: Positive | None = 10.0,
        shared_limit: Positive | None = None,
        order: Literal["before", "after"] = "before",
        alpha: Positive | None = None,
    ):
        super().__init__(config, spec)
        if not spec.gated:
            raise ValueError(
                f"Layer {spec.layer_idx}: experts of the kind 'clamped_ffn' clamp a gate, and the feed-forward of "
                "this host has none: take the kind 'ffn'."
            )
        self.unit = ClampedUnit(spec.hidden_act, limit, order, alpha)
        self.shared_unit = ClampedUnit(spec.hidden_act, shared_limit, order, alpha)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # (M, f) each
        return self.unit(gate, up)
