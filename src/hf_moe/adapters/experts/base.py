"""What every kind of experts offers to the layer that holds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from ..low_rank import ExpertSlots


@dataclass(frozen=True)
class Target:
    """The facts of one target.

    Attributes:
        name: last part of its name, such as `"down_proj"`.
        in_features, out_features: widths of what it reads and returns.
        num_experts: E.
        ranks: rank of every expert.
        init_zero: start with experts that change nothing.
    """

    name: str
    in_features: int
    out_features: int
    num_experts: int
    ranks: tuple[int, ...]
    init_zero: bool = True

    @property
    def rank(self) -> int:
        """The largest rank, to which the others are padded."""
        return max(self.ranks)


class ExpertKind:
    """Base of the kinds of experts; options are the keyword arguments of the constructor after `target`."""

    # Whether the experts run on mixed slots (Soft MoE) too.
    takes_mixed_slots = False

    def __init__(self, target: Target):
        self.target = target

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the initial trainable tensors, by container (`"A"`, `"B"`, `"vector"`), experts first."""
        raise NotImplementedError

    def forward(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        tensors: dict[str, torch.Tensor],
        slots: "ExpertSlots",
    ) -> torch.Tensor:
        """Return what the target computes with its experts.

        Args:
            call: the target without them.
            x (`torch.Tensor` of shape `(..., in)`).
            prepare: casts and drops out what the experts read.
            tensors: the trainable ones, with the scaling already in `"B"`.
            slots: the decision of the router; kinds that take mixed slots may get `MixedSlots`.
        """
        raise NotImplementedError


def low_rank_pair(target: Target, inner: int = 1) -> dict[str, torch.Tensor]:
    """Return A (E, inner * r, in), started as `nn.Linear` starts, which is how LoRA starts, and B (E, out, r), zero.

    Rows and columns beyond an expert's own rank are zero; the layer's scaling keeps them from learning.
    """
    bound = target.in_features**-0.5
    a = torch.empty(target.num_experts, inner * target.rank, target.in_features).uniform_(-bound, bound)
    b = torch.zeros(target.num_experts, target.out_features, target.rank)
    if not target.init_zero:
        b.normal_(std=target.rank**-0.5)
    for expert, rank in enumerate(target.ranks):
        a[expert].unflatten(0, (inner, target.rank))[:, rank:] = 0.0
        b[expert, :, rank:] = 0.0
    return {"A": a, "B": b}
