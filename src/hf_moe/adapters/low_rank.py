"""The ways to compute a mixture of low-rank experts, and the choice between them.

    y = base + s * sum_i g_i B_i act(A_i x)        A (E, r, in), B (E, out, r)

*Masked dense*: all A as one product, times the gates, all B as another; the cost grows with E * r. *Grouped*: tokens
sorted by expert, one product per expert and matrix; the cost grows with K * r. *Padded*: the same with one batched
product for all experts, over rows as long as the longest; twice as fast as one by one, where loads are not too uneven.
Without `act` the experts are LoRA.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch.nn import functional as F

from ..modeling.dispatch import compute_dtype, grouped_linear
from ..modeling.routing import ExpertAssignment, SlotMixture


# The most bytes of a token's E * r inner states for which two plain matrix products are faster than sorted ones:
# E * r = 64 in float32, 128 in bfloat16.
MAX_DENSE_BYTES = 256
# How many rows, as a multiple of the filled ones, padding may make of them.
MAX_PADDING = 2.0

Activation = Callable[[torch.Tensor], torch.Tensor]


class ExpertSlots:
    """A decision in the forms that the products need, each made once, however many targets share the decision.

    Args:
        assignment: of T tokens to E experts.
        device: where they are needed; where they are when `None`.
    """

    def __init__(self, assignment: ExpertAssignment, device: torch.device | None = None):
        weight = assignment.expert_weight
        if assignment.input_scale is not None:
            weight = weight * assignment.input_scale[:, None]
        self.index = assignment.expert_index.to(device)  # (T, K)
        self.weight = weight.to(device)  # (T, K)
        self.num_experts = assignment.num_experts
        self._gathered: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.index)

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

    @cached_property
    def padding(self) -> float:
        """How many times as many rows there are with every expert's as long as the longest."""
        token, _, offsets = self.by_expert
        longest = int(torch.diff(offsets, prepend=offsets.new_zeros(1)).max())
        return self.num_experts * longest / max(len(token), 1)

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The filled slots as one row per expert, all as long as the longest: token (E, C) and weight (E, C).

        What is behind an expert's own slots has the weight 0 and the token 0.
        """
        token, weight, offsets = self.by_expert
        counts = torch.diff(offsets, prepend=offsets.new_zeros(1)).long()  # (E,)
        longest = int(counts.max())
        expert = torch.arange(self.num_experts, device=token.device).repeat_interleave(counts)  # (M,)
        place = torch.arange(len(token), device=token.device) - (offsets.long() - counts)[expert]
        cell = expert * longest + place
        tokens = token.new_zeros(self.num_experts * longest).index_copy(0, cell, token)
        weights = weight.new_zeros(len(tokens)).index_copy(0, cell, weight)
        return tokens.view(self.num_experts, -1), weights.view(self.num_experts, -1)

    def rows(self, inputs: torch.Tensor, token: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the inputs (..., in) of the tokens of slots, (len(token), in).

        Gathered once for targets with the same inputs and the same `token`, that of `by_expert` or `padded`.
        """
        if self._gathered is None or self._gathered[0] is not inputs or self._gathered[1] is not token:
            tokens = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
            self._gathered = inputs, token, tokens.index_select(0, token.flatten())
        return self._gathered[2]


class MixedSlots:
    """A decision that mixes the tokens of a sequence into slots, as in Soft MoE.

    Args:
        mixture: of B sequences of S tokens to N = E * p slots.
    """

    def __init__(self, mixture: SlotMixture):
        self.mixture = mixture

    def __len__(self) -> int:
        return self.mixture.dispatch[..., 0].numel()


def add_experts(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: ExpertSlots | MixedSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output to that of the base layer, by the faster form.

    Args:
        result (`torch.Tensor` of shape `(..., out)`): the base layer's output, which sets the dtype.
        inputs (`torch.Tensor` of shape `(..., in)`): T tokens.
        lora_a (`torch.Tensor` of shape `(E, r, in)`): twice as many rows where `activation` halves them.
        lora_b (`torch.Tensor` of shape `(E, out, r)`).
        slots: the decision for the T tokens; its weights hold the scaling.
        activation: between A and B, on the last dimension.
    """
    if isinstance(slots, MixedSlots):
        return mixed_slots(result, inputs, lora_a, lora_b, slots, activation)
    num_experts, rank, _ = lora_a.shape
    dtype = compute_dtype(inputs)
    # Where every token uses every expert, sorting saves nothing.
    if num_experts * rank * dtype.itemsize <= MAX_DENSE_BYTES or slots.index.shape[1] >= num_experts:
        return masked_dense(result, inputs, lora_a, lora_b, slots, activation)
    one_by_one = slots.padding > MAX_PADDING or inputs.device.type == "cuda"  # which has a grouped kernel
    return (grouped if one_by_one else padded)(result, inputs, lora_a, lora_b, slots, activation)


def masked_dense(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: ExpertSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output as two products over all experts, with the gates between them."""
    inner = F.linear(inputs.reshape(-1, inputs.shape[-1]), lora_a.flatten(0, 1))  # (T, E * r)
    if activation is not None:
        inner = activation(inner.unflatten(1, lora_a.shape[:2])).flatten(1)
    inner = inner * slots.gates.to(inner.dtype).repeat_interleave(lora_b.shape[2], dim=1)
    output = F.linear(inner, lora_b.transpose(0, 1).flatten(1))  # (T, out)
    return result + output.view(result.shape).to(result.dtype)


def grouped(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: ExpertSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output as one product per expert and matrix, over the tokens that chose it."""
    dtype = compute_dtype(inputs)
    token, weight, offsets = slots.by_expert
    inner = grouped_linear(slots.rows(inputs, token, dtype), lora_a, offsets)  # (M, r)
    if activation is not None:
        inner = activation(inner)
    output = grouped_linear(inner * weight[:, None].to(dtype), lora_b, offsets)  # (M, out)
    tokens = result.reshape(-1, result.shape[-1])
    return tokens.index_add(0, token, output.to(result.dtype)).view(result.shape)


def padded(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: ExpertSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output as one batched product per matrix, over rows of equal length."""
    dtype = compute_dtype(inputs)
    token, weight = slots.padded
    rows = slots.rows(inputs, token, dtype).view(*token.shape, inputs.shape[-1])  # (E, C, in)
    inner = torch.bmm(rows, lora_a.to(dtype).mT)  # (E, C, r)
    if activation is not None:
        inner = activation(inner)
    output = torch.bmm(inner * weight[..., None].to(dtype), lora_b.to(dtype).mT)  # (E, C, out)
    tokens = result.reshape(-1, result.shape[-1])
    return tokens.index_add(0, token.flatten(), output.flatten(0, 1).to(result.dtype)).view(result.shape)


def mixed_slots(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: MixedSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output on their mixed slots: inputs `dispatch^T x`, outputs `combine y`."""
    dtype = compute_dtype(inputs)
    dispatch, combine = slots.mixture.dispatch.to(dtype), slots.mixture.combine.to(dtype)  # (B, S, N) both
    tokens = inputs.reshape(*dispatch.shape[:2], -1).to(dtype)
    mixed = torch.einsum("bsn,bsd->nbd", dispatch, tokens)
    experts = mixed.reshape(len(lora_a), -1, mixed.shape[-1])  # (E, p * B, in)
    inner = torch.bmm(experts, lora_a.to(dtype).transpose(1, 2))
    if activation is not None:
        inner = activation(inner)
    output = torch.bmm(inner, lora_b.to(dtype).transpose(1, 2)).reshape(*mixed.shape[:2], -1)  # (N, B, out)
    return result + torch.einsum("bsn,nbd->bsd", combine, output).view(result.shape).to(result.dtype)
