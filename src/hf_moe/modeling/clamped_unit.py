"""The gated unit of feed-forwards that bound what they multiply, as large models in low precision do.

    order "before"    act(min(g, L)) * clip(u, -L, L)
    order "after"     min(act(g), L) * clip(u, -L, L)
    with alpha        act(g) = g sigmoid(alpha g), and the up projection counts one more: clip(u, -L, L) + 1

of a gate g = W_gate x and u = W_up x. Sources: Transformers' `glm5_next` and `hy_v4_vl` (before), `step3p7` (after),
`minimax_m3_vl` (alpha, as in GPT-OSS).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClampedUnit:
    """Joins the gate and the up projection of a feed-forward, see above; without options `act(g) * u`.

    Attributes:
        limit: L; `None` clamps nothing.
        order: whether the gate is clamped `"before"` its activation or `"after"` it.
        alpha: takes the place of the activation.
    """

    limit: float | None = None
    order: str = "before"
    alpha: float | None = None

    def __call__(
        self, act_fn: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        if self.limit is None and self.alpha is None:
            return act_fn(gate) * up
        limit = math.inf if self.limit is None else self.limit
        gate = gate.clamp(max=limit) if self.order == "before" else gate
        gate = act_fn(gate) if self.alpha is None else gate * torch.sigmoid(self.alpha * gate)
        gate = gate.clamp(max=limit) if self.order == "after" else gate
        up = up.clamp(min=-limit, max=limit)
        return gate * (up if self.alpha is None else up + 1.0)
