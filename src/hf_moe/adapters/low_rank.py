"""The two ways to compute a mixture of low-rank experts, and the choice between them.

    y = base + s * sum_i g_i B_i A_i x        A (E, r, in), B (E, out, r)

*Masked dense*: all A as one product, times the gates, all B as another; the cost grows with E * r. *Grouped*: tokens
sorted by expert, one product per expert and matrix; the cost grows with K * r.
"""

from functools import cached_property

import torch
from torch.nn import functional as F

from ..modeling.dispatch import compute_dtype, grouped_linear
from ..modeling.routing import ExpertAssignment


# The largest E * r for which two plain matrix products are faster than sorted ones.
MAX_DENSE_WIDTH = 128


class ExpertSlots:
    """A decision in the forms that the products need, each made once, however many targets share the decision.

    Args:
        assignment: of T tokens to E experts.
    """

    def __init__(self, assignment: ExpertAssignment):
        weight = assignment.expert_weight
        if assignment.input_scale is not None:
            weight = weight * assignment.input_scale[:, None]
        self.index = assignment.expert_index  # (T, K)
        self.weight = weight  # (T, K)
        self.num_experts = assignment.num_experts
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    @cached_property
    def gates(self) -> torch.Tensor:
        """The weight of every expert in every token, (T, E)."""
        gates = self.weight.new_zeros(len(self.index), self.num_experts + 1)
        return gates.scatter_add(1, self.index, self.weight)[:, : self.num_experts]

    @cached_property
    def by_expert(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The filled slots sorted by expert: token (M,), weight (M,), and the end of every expert's slots (E,)."""
        sorted_index, order = self.index.reshape(-1).sort(stable=True)
        experts = torch.arange(self.num_experts, device=order.device)
        offsets = torch.searchsorted(sorted_index, experts, right=True).int()
        order = order[: int(offsets[-1])]
        return order // self.index.shape[1], self.weight.reshape(-1).index_select(0, order), offsets

    def rows(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the inputs (..., in) of the sorted slots, (M, in); gathered once for targets with the same inputs."""
        if self._gathered is None or self._gathered[0] is not inputs:
            tokens = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
            self._gathered = inputs, tokens.index_select(0, self.by_expert[0])
        return self._gathered[1]


def add_experts(
    result: torch.Tensor, inputs: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, slots: ExpertSlots
) -> torch.Tensor:
    """Add the experts' output to that of the base layer, by the faster form.

    Args:
        result (`torch.Tensor` of shape `(..., out)`): the base layer's output, which sets the dtype.
        inputs (`torch.Tensor` of shape `(..., in)`): T tokens.
        lora_a (`torch.Tensor` of shape `(E, r, in)`).
        lora_b (`torch.Tensor` of shape `(E, out, r)`).
        slots: the decision for the T tokens; its weights hold the scaling.
    """
    num_experts, rank, _ = lora_a.shape
    # Where every token uses every expert, sorting saves nothing.
    dense = num_experts * rank <= MAX_DENSE_WIDTH or slots.index.shape[1] >= num_experts
    return (masked_dense if dense else grouped)(result, inputs, lora_a, lora_b, slots)


def masked_dense(
    result: torch.Tensor, inputs: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, slots: ExpertSlots
) -> torch.Tensor:
    """Add the experts' output as two products over all experts, with the gates between them."""
    inner = F.linear(inputs.reshape(-1, inputs.shape[-1]), lora_a.flatten(0, 1))  # (T, E * r)
    inner = inner * slots.gates.to(inner.dtype).repeat_interleave(lora_a.shape[1], dim=1)
    output = F.linear(inner, lora_b.transpose(0, 1).flatten(1))  # (T, out)
    return result + output.view(result.shape).to(result.dtype)


def grouped(
    result: torch.Tensor, inputs: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, slots: ExpertSlots
) -> torch.Tensor:
    """Add the experts' output as one product per expert and matrix, over the tokens that chose it."""
    dtype = compute_dtype(inputs)
    token, weight, offsets = slots.by_expert
    inner = grouped_linear(slots.rows(inputs, dtype), lora_a, offsets)  # (M, r)
    output = grouped_linear(inner * weight[:, None].to(dtype), lora_b, offsets)  # (M, out)
    tokens = result.reshape(-1, result.shape[-1])
    return tokens.index_add(0, token, output.to(result.dtype)).view(result.shape)
