"""The ways to compute a mixture of low-rank experts, and the choice between them.

    y = base + s * sum_i g_i B_i act(A_i x)        A (E, r, in), B (E, out, r)

*Masked dense*: all A as one product, times the gates, all B as another; the cost grows with E * r. *Grouped*: tokens
sorted by expert, one product per expert and matrix; the cost grows with K * r. *Bucketed*, on a CPU: the same with one
batched product for experts of like load, over rows as long as the longest of them.
Without `act` the experts are LoRA.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..modeling.decisions import ExpertAssignment, SlotMixture
from ..modeling.dispatch import compute_dtype, grouped_linear
from ..modeling.routing_context import made_once


# The most bytes of a token's E * r inner states for which two plain matrix products are faster than sorted ones:
# E * r = 64 in float32, 128 in bfloat16.
MAX_DENSE_BYTES = 256

Activation = Callable[[torch.Tensor], torch.Tensor]


class BucketedSlots(NamedTuple):
    """The M filled slots of T tokens in R rows, where experts of one bucket have equally many.

    Attributes:
        buckets: the experts (n,) of every bucket and their rows, expert by expert.
        token (`torch.Tensor` of shape `(R,)`): whose slot a row is; 0 in rows that fill up.
        weight (`torch.Tensor` of shape `(R,)`): the slot's weight; 0 in rows that fill up.
        filled (`torch.Tensor` of shape `(M,)`): the other rows, sorted by token.
        starts (`torch.Tensor` of shape `(T,)`): where in `filled` every token begins.
    """

    buckets: list[tuple[torch.Tensor, slice]]
    token: torch.Tensor
    weight: torch.Tensor
    filled: torch.Tensor
    starts: torch.Tensor


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
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None
        self._repeated: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @made_once
    def gates(self) -> torch.Tensor:
        """The weight of every expert in every token, (T, E)."""
        gates = self.weight.new_zeros(len(self.index), self.num_experts + 1)
        return gates.scatter_add(1, self.index, self.weight)[:, : self.num_experts]

    def repeated_gates(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `gates`, each for all rows of its expert, (T, E * r); made once for targets of one rank."""
        if (
            self._repeated is None
            or self._repeated.shape[1] != rank * self.num_experts
            or self._repeated.dtype != dtype
        ):
            self._repeated = self.gates.to(dtype).repeat_interleave(rank, dim=1)
        return self._repeated

    @made_once
    def by_expert(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The filled slots sorted by expert: token (M,), weight (M,), and the end of every expert's slots (E,)."""
        sorted_index, order = self.index.reshape(-1).sort(stable=True)
        experts = torch.arange(self.num_experts, device=order.device)
        offsets = torch.searchsorted(sorted_index, experts, right=True).int()
        order = order[: int(offsets[-1])]
        return order // self.index.shape[1], self.weight.reshape(-1).index_select(0, order), offsets

    @made_once
    def bucketed(self) -> BucketedSlots:
        """The filled slots in buckets: the experts, sorted by load, are cut at 1, 2, 4, 8, ... where the load falls.

        However uneven the loads are, there are not 2.6 times as many rows as filled slots.
        """
        token, weight, offsets = self.by_expert
        counts = torch.diff(offsets, prepend=offsets.new_zeros(1)).long()  # (E,)
        order = counts.argsort(descending=True, stable=True)
        loads = counts[order].tolist()
        buckets: list[tuple[torch.Tensor, slice]] = []
        first: list[int] = []  # first row of the experts in `order`
        start = rows = 0
        while start < len(loads) and loads[start] > 0:
            end = max(2 * start, 1)
            while end < len(loads) and 8 * loads[end] > 7 * loads[start]:
                end *= 2
            experts = order[start:end]
            # In steps of at most an eighth: oneDNN compiles a kernel for every new size.
            step = 1 << max(loads[start].bit_length() - 4, 0)
            length = -(-loads[start] // step) * step
            first.extend(range(rows, rows + len(experts) * length, length))
            buckets.append((experts, slice(rows, rows + len(experts) * length)))
            start, rows = end, rows + len(experts) * length
        shift = counts - offsets  # (E,), from a slot's place in `token` to its row
        shift[order[: len(first)]] += shift.new_tensor(first)
        row = torch.arange(len(token), device=token.device) + shift.repeat_interleave(counts)  # (M,)
        by_token, places = token.sort(stable=True)
        return BucketedSlots(
            buckets,
            token.new_zeros(rows).index_copy(0, row, token),
            weight.new_zeros(rows).index_copy(0, row, weight),
            row[places],
            torch.searchsorted(by_token, torch.arange(len(self), device=token.device)),
        )

    def rows(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the inputs (..., in) of the filled slots sorted by expert, (M, in).

        Gathered once for targets with the same inputs.
        """
        if self._gathered is None or self._gathered[0] is not inputs:
            tokens = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
            self._gathered = inputs, tokens.index_select(0, self.by_expert[0])
        return self._gathered[1]


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
    if runs_dense(inputs, len(lora_a) * lora_a.shape[1], slots):
        return masked_dense(result, inputs, lora_a, lora_b, slots, activation)
    form = bucketed if inputs.device.type == "cpu" else grouped
    return form(result, inputs, lora_a, lora_b, slots, activation)


def runs_dense(inputs: torch.Tensor, total_rank: int, slots: ExpertSlots) -> bool:
    """Whether all experts, of this rank together, are computed for every token rather than sorted."""
    # Where every token uses every expert, sorting saves nothing.
    every_expert = slots.index.shape[1] >= slots.num_experts
    return every_expert or total_rank * compute_dtype(inputs).itemsize <= MAX_DENSE_BYTES


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
    inner = inner * slots.repeated_gates(lora_b.shape[2], inner.dtype)
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
    inner = grouped_linear(slots.rows(inputs, dtype), lora_a, offsets)  # (M, r)
    if activation is not None:
        inner = activation(inner)
    output = grouped_linear(inner * weight[:, None].to(dtype), lora_b, offsets)  # (M, out)
    tokens = result.reshape(-1, result.shape[-1])
    return tokens.index_add(0, token, output.to(result.dtype)).view(result.shape)


def bucketed(
    result: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    slots: ExpertSlots,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output as one batched product per bucket and matrix."""
    dtype = compute_dtype(inputs)
    inner = Shrink.apply(inputs.reshape(-1, inputs.shape[-1]).to(dtype), lora_a, slots.bucketed)  # (R, r)
    if activation is not None:
        inner = activation(inner)
    inner = inner * slots.bucketed.weight[:, None].to(dtype)
    output = Expand.apply(inner, lora_b.mT, slots.bucketed)  # (T, out)
    return result + output.view(result.shape).to(result.dtype)


class Shrink(torch.autograd.Function):
    """`A_i x` of every row, from tokens (T, in) and the stack (E, r, in); the rows' inputs are not kept."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, stack: torch.Tensor, slots: BucketedSlots) -> torch.Tensor:
        ctx.slots = slots
        ctx.save_for_backward(tokens, stack)
        return shrink(tokens, stack, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_inner: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        tokens, stack = ctx.saved_tensors
        grad_tokens = expand(grad_inner, stack, ctx.slots) if ctx.needs_input_grad[0] else None
        grad_stack = outer(grad_inner, tokens, stack, ctx.slots) if ctx.needs_input_grad[1] else None
        return grad_tokens, grad_stack, None


class Expand(torch.autograd.Function):
    """The sum of `B_i h` over the rows of every token, from rows (R, r) and the stack (E, r, out)."""

    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor, stack: torch.Tensor, slots: BucketedSlots) -> torch.Tensor:
        ctx.slots = slots
        ctx.save_for_backward(inner, stack)
        return expand(inner, stack, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        inner, stack = ctx.saved_tensors
        grad_inner = shrink(grad_output, stack, ctx.slots) if ctx.needs_input_grad[0] else None
        grad_stack = outer(inner, grad_output, stack, ctx.slots) if ctx.needs_input_grad[1] else None
        return grad_inner, grad_stack, None


def shrink(tokens: torch.Tensor, stack: torch.Tensor, slots: BucketedSlots) -> torch.Tensor:
    """Return the product of every row's token (T, width) with its expert's matrix, (R, r)."""
    inner = tokens.new_empty(len(slots.token), stack.shape[1])
    for experts, rows in slots.buckets:
        matrices = stack.index_select(0, experts).to(tokens.dtype)  # (n, r, width)
        inputs = tokens.index_select(0, slots.token[rows]).view(len(experts), -1, tokens.shape[1])  # (n, C, width)
        torch.bmm(inputs, matrices.mT, out=inner[rows].view(len(experts), -1, inner.shape[1]))
    return inner


def expand(inner: torch.Tensor, stack: torch.Tensor, slots: BucketedSlots) -> torch.Tensor:
    """Return the sum over the rows (R, r) of every token of the product with their experts' matrices, (T, width)."""
    output = inner.new_empty(len(inner), stack.shape[2])  # (R, width)
    for experts, rows in slots.buckets:
        matrices = stack.index_select(0, experts).to(inner.dtype)  # (n, r, width)
        out = output[rows].view(len(experts), -1, output.shape[1])  # (n, C, width)
        torch.bmm(inner[rows].view(len(experts), -1, inner.shape[1]), matrices, out=out)
    # Several times as fast as `index_add`, and sums in float32.
    return F.embedding_bag(slots.filled, output, slots.starts, mode="sum")


def outer(inner: torch.Tensor, tokens: torch.Tensor, stack: torch.Tensor, slots: BucketedSlots) -> torch.Tensor:
    """Return the gradient of the stack (E, r, width): outer products of the rows (R, r) with their tokens."""
    gradient = torch.zeros_like(stack, memory_format=torch.contiguous_format)
    for experts, rows in slots.buckets:
        inputs = tokens.index_select(0, slots.token[rows]).view(len(experts), -1, tokens.shape[1])  # (n, C, width)
        product = torch.bmm(inner[rows].view(len(experts), -1, inner.shape[1]).mT, inputs)  # (n, r, width)
        gradient.index_copy_(0, experts, product.to(stack.dtype))
    return gradient


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
    dispatch, combine = (part.to(inputs.device, dtype) for part in (slots.mixture.dispatch, slots.mixture.combine))
    tokens = inputs.reshape(*dispatch.shape[:2], -1).to(dtype)  # (B, S, in); the two above are (B, S, N)
    mixed = torch.einsum("bsn,bsd->nbd", dispatch, tokens)
    experts = mixed.reshape(len(lora_a), -1, mixed.shape[-1])  # (E, p * B, in)
    inner = torch.bmm(experts, lora_a.to(dtype).transpose(1, 2))
    if activation is not None:
        inner = activation(inner)
    output = torch.bmm(inner, lora_b.to(dtype).transpose(1, 2)).reshape(*mixed.shape[:2], -1)  # (N, B, out)
    return result + torch.einsum("bsn,nbd->bsd", combine, output).view(result.shape).to(result.dtype)
