"""Ragged dispatch: the experts backend in which an empty slot costs no matrix work.

It registers in Transformers' `ExpertsInterface` as `"ragged"`, beside `eager`, `batched_mm` and `grouped_mm`, with
their signature: `(experts module, hidden (T, d), index (T, K), weight (T, K)) -> (T, d)`, where the index
`num_experts` marks an empty slot.
"""

from collections.abc import Iterator
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


class GroupedProduct(torch.autograd.Function):
    """One matrix product per group, `rows[g] @ weight[e].T`, in the dtype of the rows.

    The weight of one expert at a time is cast, and only if the expert is in use: a cast of the whole stack would cost
    more than the products where tokens are few, and would be kept for the backward. The gradient of the stack is
    written in place, expert by expert; autograd would allocate it once per indexed expert, or stack copies.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        output = rows.new_empty(rows.shape[0], weight.shape[1])  # (M, out)
        for expert, group in GroupedProduct.groups(offsets):
            if group.start < group.stop:
                torch.mm(rows[group], weight[expert].to(rows.dtype).t(), out=output[group])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        rows_wanted, weight_wanted, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if rows_wanted else None  # (M, in)
        grad_weight = weight.new_empty(weight.shape) if weight_wanted else None  # (E, out, in)
        for expert, group in GroupedProduct.groups(offsets):
            if grad_rows is not None and group.start < group.stop:
                torch.mm(grad_output[group], weight[expert].to(rows.dtype), out=grad_rows[group])
            if grad_weight is None:
                continue
            if group.start == group.stop:
                grad_weight[expert].zero_()
            elif weight.dtype == rows.dtype:
                torch.mm(grad_output[group].t(), rows[group], out=grad_weight[expert])
            else:
                grad_weight[expert].copy_(torch.mm(grad_output[group].t(), rows[group]))
        return grad_rows, grad_weight, None

    @staticmethod
    def groups(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
        """Yield every expert and the slice of its rows."""
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            yield expert, slice(start, end)
            start = end


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
    """Apply expert e's linear map to the rows of group e, in the dtype of the rows.

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


# The sizes of the groups are data: traced, every grouped product would break the graph; so it breaks once, around all.
@torch.compiler.disable
def ragged_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sort the filled slots by expert, run one grouped product per projection, scale and add back."""
    dtype = compute_dtype(hidden_states)
    slots = top_k_index.shape[-1]
    sorted_index, order = top_k_index.reshape(-1).sort(stable=True)  # (T * K,) both; empty slots come last
    experts = torch.arange(self.num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_index, experts, right=True).int()  # (E,)
    order = order[: int(offsets[-1])]  # (M,) filled slots
    token = order // slots  # (M,)

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        weight = weight.transpose(1, 2) if self.is_transposed else weight  # (E, out, in)
        return grouped_linear(rows, weight, offsets, getattr(self, f"{name}_bias") if self.has_bias else None)

    rows = hidden_states.to(dtype).index_select(0, token)  # (M, d)
    inner = self._apply_gate(project(rows, "gate_up_proj")) if self.has_gate else self.act_fn(project(rows, "up_proj"))
    output = project(inner, "down_proj")  # (M, d)
    if self.has_post_expert_norm:
        output = self.post_expert_norm(output)
    output = output * top_k_weights.reshape(-1).index_select(0, order).to(dtype)[:, None]
    result = torch.zeros_like(hidden_states, dtype=dtype)
    return result.index_add(0, token, output).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(RAGGED, ragged_experts_forward)
