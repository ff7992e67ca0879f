"""What every kind of experts offers to the layer that holds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from ..low_rank import ExpertSlots


# Where experts of unequal rank lie side by side: rows of A, columns of B.
RANK_DIM = {"A": -2, "B": -1}


@dataclass(frozen=True)
class Target:
    """The facts of one target.

    Attributes:
        name: last part of its name, such as `"down_proj"`.
        in_features, out_features: widths of what it reads and returns.
        num_experts: E, or E * H on the stacked weight of H host experts, where every expert has H parts.
        ranks: rank of every expert or part.
        init_zero: start with experts that change nothing.
        num_host_experts: H.
        head_dim: width of a head, of a projection in an attention that tells.
    """

    name: str
    in_features: int
    out_features: int
    num_experts: int
    ranks: tuple[int, ...]
    init_zero: bool = True
    num_host_experts: int = 1
    head_dim: int | None = None

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    @property
    def unequal_ranks(self) -> bool:
        """Whether low-rank experts are stored side by side, and not as stacks."""
        return len(set(self.ranks)) > 1

    def split(self, container: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return views of what belongs to each expert, or to each part of each, in a tensor of this container."""
        if container == "vector":
            return list(tensor)
        if self.unequal_ranks:
            return list(tensor.split(self.ranks, dim=RANK_DIM[container]))
        return list(tensor.flatten(0, -3))


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

    def forward(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        tensors: dict[str, Any],
        slots: "ExpertSlots",
    ) -> torch.Tensor:
        """Return what the target computes with its experts.

        Args:
            call: the target without them.
            x (`torch.Tensor` of shape `(..., in)`).
            prepare: casts and drops out what the experts read.
            tensors: the trainable ones, with the scaling already in `"B"`, and in `"ranks"` the `UnequalRanks` of
                experts of unequal rank.
            slots: the decision of the router; kinds that take mixed slots may get `MixedSlots`.
        """
        raise NotImplementedError


def low_rank_pair(target: Target, inner: int = 1) -> dict[str, torch.Tensor]:
    """Return A, started as `nn.Linear` starts, which is how LoRA starts, and B, zero.

    A is (E, inner * r, in) and B (E, out, r); of unequal ranks with the sum R, A is (R, in), or (inner, R, in), and B
    (out, R).
    """
    width, bound = target.in_features, target.in_features**-0.5
    if target.unequal_ranks:
        total = sum(target.ranks)
        a = torch.empty(total, width) if inner == 1 else torch.empty(inner, total, width)
        b = torch.zeros(target.out_features, total)
    else:
        a = torch.empty(target.num_experts, inner * target.rank, width)
        b = torch.zeros(target.num_experts, target.out_features, target.rank)
    a.uniform_(-bound, bound)
    if not target.init_zero:
        b.normal_(std=target.rank**-0.5)
    return {"A": a, "B": b}
