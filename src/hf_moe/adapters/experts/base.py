"""What every kind of experts offers to the layer that holds it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..stacks import Target, Weights


class TargetCall(NamedTuple):
    """One call of a target with an adapter."""

    run: Callable[[torch.Tensor], torch.Tensor]  # computes the target without the adapter
    x: torch.Tensor  # (..., in)
    prepare: Callable[[torch.Tensor], torch.Tensor]  # casts and drops out what the experts read
    weights: Weights
    decision: Any  # a `SharedAssignment`; for kinds that take mixed slots a `SlotMixture` too


class ExpertKind:
    """Base of the kinds of experts; options are the keyword arguments of the constructor after `target`."""

    # Whether the experts run on mixed slots (Soft MoE) too.
    takes_mixed_slots = False
    # Whether every expert has parameters that are no other's.
    own_parameters = True

    def __init__(self, target: Target):
        self.target = target

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the initial trainable tensors, by container: `"A"` and `"B"`, see `low_rank_pair`, or `"vector"`."""
        raise NotImplementedError

    def forward(self, call: TargetCall) -> torch.Tensor:
        """Return what the target computes with its experts."""
        raise NotImplementedError
