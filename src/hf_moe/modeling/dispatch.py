"""Ragged dispatch: the experts backend in which an empty slot costs no matrix work.

It registers in Transformers' `ExpertsInterface` as `"ragged"`, beside `eager`, `batched_mm` and `grouped_mm`, with
their signature: `(experts module, hidden (T, d), index (T, K), weight (T, K)) -> (T, d)`, where the index
`num_experts` marks an empty slot.
"""

from collections.abc import Callable
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


RAGGED = "ragged"


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """Return the dtype of the expert products: autocast's where it is on, else the hidden states'.

    `grouped_mm` takes no part in autocast, and left alone would compute in the float32 of the master weights.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype


# Below it the 10 microseconds that a call of oneDNN costs more outweigh what it saves.
ONEDNN_MULTIPLICATIONS = 2**20
# Up to it the reading of a weight is the cost of its product, and a cast only adds to it.
FEW_ROWS = 8


def onednn_serves(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether oneDNN takes the float32 product `left @ right.T`: the BLAS behind `mm` may need twice its time on x86.

    An outer product is nothing but the writing of its result, which `mm` writes in place.
    """
    return (
        left.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[1] > 1
        and left.numel() * right.shape[0] >= ONEDNN_MULTIPLICATIONS
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def write_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Write `left @ right.T` into `out`, computed in the dtype of `left`, or a wider one where that costs less."""
    dtype = left.dtype
    if left.shape[0] <= FEW_ROWS:
        dtype = torch.promote_types(dtype, right.dtype)
    elif left.shape[1] == 1:
        dtype = torch.promote_types(dtype, out.dtype)
    left, right = left.to(dtype), right.to(dtype)
    if onednn_serves(left, right):
        result = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    else:
        result = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
        # Autocast, which may be on, leaves products with `out` alone.
        torch.mm(left, right.t(), out=result)
    if result is not out:
        out.copy_(result)


def compiles_shapes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the product `left @ right.T` goes to oneDNN, which compiles a kernel for every shape it has not seen.

    Routing gives each expert another number of rows in each step, and a kernel may take longer than its product.
    """
    half = left.dtype in (torch.bfloat16, torch.float16) and left.device.type == "cpu"
    return left.shape[0] > FEW_ROWS and (half or onednn_serves(left, right))


def rounded(rows: int) -> int:
    """Return a number of rows of which there are few, at most an eighth above `rows` where those are many."""
    step = 8 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // step) * step


def write_group(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, group: slice) -> None:
    """Write `rows[group] @ weight.T` into `out[group]`. The rows of `out` after the group may be overwritten."""
    given = rows[group]
    if not compiles_shapes(given, weight):
        write_product(given, weight, out[group])
        return
    end = group.start + rounded(len(given))
    if end <= len(rows):
        write_product(rows[group.start : end], weight, out[group.start : end])
    else:
        result = out.new_empty(end - group.start, out.shape[1])
        write_product(padded(given, len(result)), weight, result)
        out[group].copy_(result[: len(given)])


def padded(rows: torch.Tensor, number: int) -> torch.Tensor:
    """Return the rows with zeros after them."""
    return F.pad(rows, (0, 0, 0, number - len(rows)))


class GroupedProduct(torch.autograd.Function):
    """One matrix product per group, `rows[g] @ weight[e].T`, with a result in the dtype of the rows.

    The weight of one expert at a time is cast, and only if many rows use it: a cast of the whole stack would cost more
    than the products where tokens are few, and would be kept for the backward. The gradient of the stack is written in
    place, expert by expert; autograd would allocate it once per indexed expert, or stack copies.

    A product may run on into rows of the next group, whose own product comes after it, so that few shapes occur.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.groups = GroupedProduct.groups(offsets)
        ctx.save_for_backward(rows, weight)
        output = rows.new_empty(rows.shape[0], weight.shape[1])  # (M, out)
        for expert, group in ctx.groups:
            write_group(rows, weight[expert], output, group)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        rows_wanted, weight_wanted, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if rows_wanted else None  # (M, in)
        grad_weight = weight.new_empty(weight.shape) if weight_wanted else None  # (E, out, in)
        # Two loops: reading weights and writing gradients in turn is slower.
        if grad_rows is not None:
            for expert, group in ctx.groups:
                write_group(grad_output, weight[expert].t(), grad_rows, group)
        if grad_weight is not None:
            written = 0
            for expert, group in ctx.groups:
                grad_weight[written:expert].zero_()
                upper, lower = grad_output[group], rows[group]
                if compiles_shapes(upper, weight[expert].t()):
                    upper, lower = (padded(part, rounded(len(part))) for part in (upper, lower))
                write_product(upper.t(), lower.t(), grad_weight[expert])
                written = expert + 1
            grad_weight[written:].zero_()
        return grad_rows, grad_weight, None

    @staticmethod
    def groups(offsets: torch.Tensor) -> list[tuple[int, slice]]:
        """Return every expert in use and the slice of its rows."""
        bounds = enumerate(pairwise([0, *offsets.tolist()]))
        return [(expert, slice(start, end)) for expert, (start, end) in bounds if start < end]


def grouped_kernel_serves(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU's one-launch kernel takes these operands; elsewhere one product per group is as fast."""
    if rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) < (8, 0) or rows.shape[0] == 0:
        return False
    # The kernel reads in steps of 16 bytes; sliced and memory-mapped weights may start anywhere.
    aligned_sizes = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return aligned_sizes and weight.is_contiguous() and weight.data_ptr() % 16 == 0


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply expert e's linear map to the rows of group e; the result has the dtype of the rows.

    Args:
        rows (`torch.Tensor` of shape `(M, in)`): sorted by expert; every row belongs to one.
        weight (`torch.Tensor` of shape `(E, out, in)`).
        offsets (`torch.Tensor` of shape `(E,)`, int32): end of every expert's rows; the last one is M.
        bias (`torch.Tensor` of shape `(E, out)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(M, out)`.
    """
    if grouped_kernel_serves(rows, weight):
        output = F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=offsets)  # (M, out)
    else:
        output = GroupedProduct.apply(rows, weight, offsets)  # (M, out)
    if bias is not None:
        counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
        output = output + bias.to(output.dtype).repeat_interleave(counts, dim=0, output_size=rows.shape[0])
    return output


class Dispatch:
    """The filled slots of T tokens, sorted by expert: M rows. A slot of index E is empty and has no row.

    Args:
        index (`torch.Tensor` of shape `(T, K)`): the expert of every slot.
        num_experts (`int`): E.

    Attributes:
        order (`torch.Tensor` of shape `(M,)`): which of the T * K slots a row belongs to.
        token (`torch.Tensor` of shape `(M,)`): which token a row belongs to.
        offsets (`torch.Tensor` of shape `(E,)`, int32): where the rows of every expert end; the last is M.
    """

    @torch.compiler.disable
    def __init__(self, index: torch.Tensor, num_experts: int):
        self.num_tokens = len(index)
        sorted_index, order = index.reshape(-1).sort(stable=True)  # (T * K,) both; empty slots come last
        experts = torch.arange(num_experts, device=order.device)
        self.offsets = torch.searchsorted(sorted_index, experts, right=True).int()
        self.order = order[: int(self.offsets[-1])]
        self.token = self.order // index.shape[-1]

    @property
    def expert(self) -> torch.Tensor:
        """The expert of every row, (M,)."""
        counts = torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))
        experts = torch.arange(len(counts), device=counts.device)
        return experts.repeat_interleave(counts, output_size=len(self.order))

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tokens' `values` (T, ...) by row, (M, ...)."""
        return values.index_select(0, self.token)

    def slot_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the slots' `values` (T, K, ...) by row, (M, ...)."""
        return values.flatten(0, 1).index_select(0, self.order)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the linear map of every expert, (E, out, in), to its rows, see [`grouped_linear`]."""
        return grouped_linear(rows, weight, self.offsets, bias)

    def add(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens' `values` (T, out) plus their rows."""
        return values.index_add(0, self.token, rows.to(values.dtype))

    def combine(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum of every token's rows times their slots' `weight` (T, K), (T, out)."""
        rows = rows * self.slot_rows(weight).to(rows.dtype)[:, None]
        return self.add(rows.new_zeros(self.num_tokens, rows.shape[-1]), rows)

    @torch.compiler.disable
    def to_groups(self, size: int, kept: torch.Tensor) -> "Dispatch":
        """Return the dispatch of some slots to groups of neighbouring experts, whose rows are sorted already.

        Args:
            size (`int`): how many experts a group has.
            kept (`torch.Tensor` of shape `(T, K)`): the slots.
        """
        here = kept.reshape(-1)[self.order]  # (M,)
        counts = F.pad(here.cumsum(0), (1, 0))  # (M + 1,), those kept among the first rows
        part = copy(self)
        part.order, part.token = self.order[here], self.token[here]
        part.offsets = counts[self.offsets[size - 1 :: size].long()].int()
        return part

    @torch.compiler.disable
    def split(self, sizes: list[int]) -> list["Dispatch"]:
        """Return the dispatch to each of successive banks of `sizes` experts."""
        # Read once: one copy from the device instead of one per bank.
        ends = self.offsets[torch.tensor(sizes, device=self.offsets.device).cumsum(0) - 1].tolist()
        parts = []
        for (start, end), offsets in zip(pairwise([0, *ends]), self.offsets.split(sizes), strict=True):
            part = copy(self)
            part.order, part.token, part.offsets = self.order[start:end], self.token[start:end], offsets - start
            parts.append(part)
        return parts


class EvenDispatch(Dispatch):
    """Rows that are sorted already, equally many for each of E experts, as those of mixed slots are.

    One batched product serves all experts, which compiles whole.

    Args:
        num_experts (`int`): E.
        num_rows (`int`): M.
        device (`torch.device`): of the rows.
    """

    def __init__(self, num_experts: int, num_rows: int, device: torch.device):
        self.num_experts = num_experts
        self.token = torch.arange(num_rows, device=device)
        self.offsets = (torch.arange(num_experts, device=device) + 1).int() * (num_rows // num_experts)

    @property
    def expert(self) -> torch.Tensor:
        return self.token // (len(self.token) // self.num_experts)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = torch.bmm(rows.view(self.num_experts, -1, rows.shape[-1]), weight.to(rows.dtype).transpose(1, 2))
        output = output if bias is None else output + bias.to(rows.dtype)[:, None]
        return output.flatten(0, 1)


def stack_linear(experts: Any, name: str, rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Apply the stacked projection `name` of experts that are stored as Transformers stores them."""
    weight = getattr(experts, name)
    weight = weight.transpose(1, 2) if experts.is_transposed else weight  # (E, out, in)
    return dispatch.linear(rows, weight, getattr(experts, f"{name}_bias") if experts.has_bias else None)


def run_stacks(
    experts: Any, tokens: torch.Tensor, dispatch: Dispatch, project: Callable[..., torch.Tensor] = stack_linear
) -> torch.Tensor:
    """Return what experts that are stored as Transformers stores them make of the tokens (T, d), by row (M, out).

    Args:
        project (`Callable`, *optional*): computes a projection in place of [`stack_linear`].
    """
    inner = project(experts, "gate_up_proj" if experts.has_gate else "up_proj", dispatch.rows(tokens), dispatch)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    output = project(experts, "down_proj", inner, dispatch)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


# The sizes of the groups are data: traced, every grouped product would break the graph; so it breaks once, around all.
@torch.compiler.disable
def run_rows(
    compute: Callable[[torch.Tensor, Dispatch], torch.Tensor],
    hidden_states: torch.Tensor,
    dispatch: Dispatch,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return what `compute` makes of tokens (T, d) and their dispatch, mixed by the slots' `weight` (T, K)."""
    rows = compute(hidden_states.to(compute_dtype(hidden_states)), dispatch)
    return dispatch.combine(rows, weight).to(hidden_states.dtype)


def out_of_order(values: torch.Tensor, order: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """Return `values` of the places in groups, (P, ...), as those of the tokens, (T, ...): 0 for one without a place.

    Args:
        order (`torch.Tensor` of shape `(P,)`): the token of every place, T for none; `None` for all of them in order.
        tokens (`int`): T.
    """
    if order is None:
        return values
    return values.new_zeros(tokens + 1, *values.shape[1:]).index_add(0, order, values)[:tokens]


def mix_slots(
    compute: Callable[[torch.Tensor, Dispatch], torch.Tensor],
    hidden_states: torch.Tensor,
    take: torch.Tensor,
    give: torch.Tensor,
    num_experts: int,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every expert on its mixed slots: inputs `take^T x`, outputs `give y`, both within one group of tokens.

    Args:
        compute (`Callable`): as of [`run_rows`].
        hidden_states (`torch.Tensor` of shape `(T, d)`).
        take, give (`torch.Tensor` of shape `(B, S, N)`): weights of the N slots, those of an expert side by side.
        num_experts (`int`): E, which divides N.
        order (`torch.Tensor` of shape `(B * S,)`, *optional*): see [`SlotMixture`].

    Returns:
        `torch.Tensor` of shape `(T, out)`.
    """
    dtype = compute_dtype(hidden_states)
    batch, positions, slots = take.shape
    placed = hidden_states if order is None else F.pad(hidden_states, (0, 0, 0, 1)).index_select(0, order)
    tokens = placed.reshape(batch, positions, -1).to(dtype)  # (B, S, d)
    inputs = torch.einsum("bsn,bsd->nbd", take.to(dtype), tokens)  # (N, B, d)
    dispatch = EvenDispatch(num_experts, slots * batch, tokens.device)
    outputs = compute(inputs.reshape(slots * batch, -1), dispatch).view(slots, batch, -1)
    mixed = torch.einsum("bsn,nbd->bsd", give.to(dtype), outputs).flatten(0, 1)
    return out_of_order(mixed, order, len(hidden_states)).to(hidden_states.dtype)


@torch.compiler.disable
def ragged_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts on their own slots alone."""
    dispatch = Dispatch(top_k_index, self.num_experts)
    rows = run_stacks(self, hidden_states.to(compute_dtype(hidden_states)), dispatch)
    return dispatch.combine(rows, top_k_weights).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(RAGGED, ragged_experts_forward)
