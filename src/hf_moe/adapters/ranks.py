"""Experts of unequal rank, side by side without padding.

    A (R, in), B (out, R), R = sum_i r_i        expert i has r_i rows of A and columns of B, behind those of i - 1

A of gated experts is (2, R, in), the gates first. Where all experts are computed for every token, A and B are those of
one LoRA of rank R with the gates between them. Where a product needs stacks, they are padded on the way to it.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .experts.base import Target
from .low_rank import Activation, ExpertSlots, MixedSlots, add_experts, runs_dense


class UnequalRanks(nn.Module):
    """The places of experts of unequal rank; no parameters, and nothing of it is saved.

    Args:
        target: the target with its experts' ranks.
        power: p of the scaling `lora_alpha / r**p`.
    """

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

    def add_experts(
        self,
        result: torch.Tensor,
        inputs: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        slots: ExpertSlots | MixedSlots,
        activation: Activation | None = None,
    ) -> torch.Tensor:
        """Add the experts' output to that of the base layer; the arguments are those of `low_rank.add_experts`."""
        if isinstance(slots, MixedSlots) or not runs_dense(inputs, len(self.place), slots):
            return add_experts(result, inputs, *self.pad(lora_a, lora_b), slots, activation)
        inner = F.linear(inputs.reshape(-1, inputs.shape[-1]), lora_a.flatten(0, -2))  # (T, R), or (T, 2R)
        if activation is not None:
            inner = activation(inner)
        inner = inner * slots.gates.to(inner.dtype).index_select(1, self.expert)
        return result + F.linear(inner, lora_b).view(result.shape).to(result.dtype)
