"""Bottleneck adapters as experts: a low-rank map with a non-linearity in the middle.

    A_i(h) = s B_i act(D_i h)                      plain
    A_i(h) = s B_i (act(G_i h) * (D_i h))          gated
    parallel:    y = f(x) + sum_i g_i A_i(x)       sequential:    y = f(x) + sum_i g_i A_i(f(x))

All B_i start at zero, so a fresh adapter changes nothing.

Sources: Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751 (sequential); Towards a Unified View of
Parameter-Efficient Transfer Learning, arXiv:2110.04366 (parallel).
"""

from dataclasses import replace

import torch
from transformers.activations import ACT2FN

from ...modeling.gating import check_choice
from ..low_rank import add_experts
from ..stacks import Target, low_rank_pair
from .base import ExpertKind, TargetCall


class BottleneckExperts(ExpertKind):
    """Bottleneck experts of inner width r beside or after a target.

    Args:
        activation: name of the non-linearity, as in Transformers' `ACT2FN`.
        gated: multiply by a second projection of the input.
        position: `"parallel"` experts read what the target reads, `"sequential"` ones what it returns.

    Raises:
        ValueError: if an option is unknown.
    """

    takes_mixed_slots = True

    def __init__(self, target: Target, *, activation: str = "gelu", gated: bool = False, position: str = "parallel"):
        super().__init__(target)
        check_choice("activation", activation, tuple(ACT2FN))
        check_choice("position", position, ("parallel", "sequential"))
        self.act_fn = ACT2FN[activation]
        self.gated = gated
        self.position = position

    def tensors(self) -> dict[str, torch.Tensor]:
        target = self.target
        if self.position == "sequential":
            target = replace(target, in_features=target.out_features)
        return low_rank_pair(target, inner=2 if self.gated else 1)

    def activate(self, inner: torch.Tensor) -> torch.Tensor:
        """Return the inner states (..., r) of projections (..., r), or (..., 2r) with the gate first."""
        if not self.gated:
            return self.act_fn(inner)
        gate, down = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * down

    def forward(self, call: TargetCall) -> torch.Tensor:
        result = call.run(call.x)
        inputs = call.prepare(call.x if self.position == "parallel" else result)
        return add_experts(result, inputs, call.weights, call.decision, self.activate)
