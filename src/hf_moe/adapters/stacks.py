"""How the experts of a target are stored: stacks, or side by side where their ranks differ.

    equal ranks      A (E, r, in), B (E, out, r)
    unequal ranks    A (R, in), B (out, R), R = sum_i r_i

With unequal ranks expert i has r_i rows of A and columns of B, after those of i - 1. A of gated experts is (E, 2r, in)
or (2, R, in), the gates first. Where all experts are computed for every token, A and B of unequal ranks are those of
one LoRA of rank R with the gates between them. Where a product needs stacks, they are padded on the way to it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


# Where experts of unequal rank lie side by side: rows of A, columns of B.
RANK_DIM = {"A": -2, "B": -1}


@dataclass(frozen=True)
class Target:
    """The facts of one target."""

    name: str  # last part of its name, such as "down_proj"
    in_features: int
    out_features: int
    num_experts: int  # E, or E * H on the stacked weight of H host experts, where every expert has H parts
    ranks: tuple[int, ...]  # of every expert or part
    init_zero: bool = True  # start with experts that change nothing
    num_host_experts: int = 1
    head_dim: int | None = None  # width of a head, of a projection in an attention that tells

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


def low_rank_pair(target: Target, inner: int = 1) -> dict[str, torch.Tensor]:
    """Return A, started as `nn.Linear` starts, which is how LoRA starts, with `inner` times r rows, and B, zero."""
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


class Stacks(nn.ParameterDict):
    """Parameters by adapter; a call returns that of an adapter."""

    def __call__(self, adapter_name: str) -> torch.Tensor:
        # Offloaded weights are brought in by the call of their module; the others are spared it.
        if "_hf_hook" in self.__dict__:
            return nn.Module.__call__(self, adapter_name)
        return self.without_hook(adapter_name)

    def without_hook(self, adapter_name: str) -> torch.Tensor:
        """Return the parameter of an adapter where it is, or what sharding has put in its place."""
        parameter = self._parameters.get(adapter_name)  # an attribute would be looked for in three places
        return getattr(self, adapter_name) if parameter is None else parameter

    def forward(self, adapter_name: str) -> torch.Tensor:
        return self[adapter_name]


class UnequalRanks(nn.Module):
    """The places of experts of unequal rank, scaled by `lora_alpha / r**power`; no parameters, nothing saved."""

    def __init__(self, target: Target, power: float):
        super().__init__()
        self.stack_shape = target.num_experts, target.rank
        self.num_host_experts = target.num_host_experts
        self.power = power
        ranks = torch.tensor(target.ranks)
        expert = torch.arange(target.num_experts).repeat_interleave(ranks)
        first = ranks.cumsum(0) - ranks
        # All (R,): expert of every row, rank of that expert, and the row in the padded stack. Integers, since a cast
        # of the model reaches every buffer of floating point.
        self.register_buffer("expert", expert, persistent=False)
        self.register_buffer("rank", ranks[expert], persistent=False)
        place = expert * target.rank + torch.arange(len(expert)) - first[expert]
        self.register_buffer("place", place, persistent=False)

    @property
    def scaling(self) -> torch.Tensor:
        """The scaling of every row over that of the largest rank, (R,)."""
        return (self.stack_shape[1] / self.rank) ** self.power

    def rows_of(self, experts: torch.Tensor) -> torch.Tensor:
        """Return the rows of these experts, with all their parts on stacked weights."""
        return torch.isin(self.expert // self.num_host_experts, experts).nonzero().squeeze(1)

    def pad(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stacks A (E, r, in), of gated experts (E, 2r, in), and B (E, out, r), for the largest rank r."""
        rows = self.stack_shape[0] * self.stack_shape[1]
        wide_a = lora_a.new_zeros(*lora_a.shape[:-2], rows, lora_a.shape[-1]).index_copy_(-2, self.place, lora_a)
        wide_b = lora_b.new_zeros(rows, len(lora_b)).index_copy_(0, self.place, lora_b.t().contiguous())
        stack_a = wide_a.unflatten(-2, self.stack_shape).movedim(-3, 0).flatten(1, -2)
        stack_b = wide_b.unflatten(0, self.stack_shape).mT
        # The grouped kernel of GPUs takes contiguous stacks alone; the products of a CPU read this one as it is.
        return stack_a, stack_b.contiguous() if stack_b.is_cuda else stack_b


class Weights(NamedTuple):
    """The tensors of an adapter on a target, as far as its kind of experts has them."""

    a: Any = None  # (E, r, in); twice as many rows where the activation halves them
    b: Any = None  # (E, out, r)
    vector: Any = None  # (E, ...)
    scaling: float = 1.0
    ranks: UnequalRanks | None = None  # then A is (R, in), and B (out, R) holds the scaling
