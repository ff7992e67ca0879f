"""Ragged dispatch: the experts backend in which an empty slot costs no matrix work.

It registers in Transformers' `ExpertsInterface` as `"ragged"`, beside `eager`, `batched_mm` and `grouped_mm`, with
their signature: `(experts module, hidden (T, d), index (T, K), weight (T, K)) -> (T, d)`, where the index
`num_experts` marks an empty slot.
"""

import torch
from torch import nn
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


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply expert e's linear map to the rows of group e.

    Args:
        rows (`torch.Tensor` of shape `(M, in)`): sorted by expert; every row belongs to one.
        weight (`torch.Tensor` of shape `(E, out, in)`).
        offsets (`torch.Tensor` of shape `(E,)`, int32): end of every expert's rows; the last one is M.
        bias (`torch.Tensor` of shape `(E, out)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(M, out)`.
    """
    num_experts, out_size, in_size = weight.shape
    # grouped_mm wants strides of 16 bytes, of the rows and of both layouts of the weights (the backward transposes).
    aligned = all(size * rows.element_size() % 16 == 0 for size in (in_size, out_size))
    if aligned and rows.shape[0] > 0:
        # Memory-mapped or sliced weights may start anywhere; the kernel reads them in 16-byte steps.
        weight = weight if weight.data_ptr() % 16 == 0 else weight.clone()
        output = F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)  # (M, out)
    else:
        ends = offsets.tolist()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        # One product per group over `unbind` views: indexing a stacked parameter in the loop would make the backward
        # allocate the whole stack once per expert.
        groups = zip(rows.split(sizes), weight.unbind(0), strict=True)
        output = torch.cat([F.linear(group, matrix) for group, matrix in groups])  # (M, out)
    if bias is not None:
        counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
        output = output + bias.to(output.dtype).repeat_interleave(counts, dim=0, output_size=rows.shape[0])
    return output


def ragged_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sort the filled slots by expert, run one grouped product per projection, scale and add back."""
    dtype = compute_dtype(hidden_states)
    slots = top_k_index.shape[-1]
    sorted_index, order = top_k_index.reshape(-1).sort(stable=True)  # (T * K,) both; empty slots come last
    experts = torch.arange(self.num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_index, experts, right=True).int()  # (E,)
    # The only host synchronisation, and the place where a compiled graph breaks.
    order = order[: int(offsets[-1])]  # (M,) filled slots
    token = order // slots  # (M,)

    rows = hidden_states.to(dtype).index_select(0, token)  # (M, d)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    weight, bias = getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None
    inner = grouped_linear(rows, weight.to(dtype), offsets, bias)  # (M, 2f) or (M, f)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # (M, f)
    down_bias = self.down_proj_bias if self.has_bias else None
    output = grouped_linear(inner, self.down_proj.to(dtype), offsets, down_bias)  # (M, d)

    output = output * top_k_weights.reshape(-1).index_select(0, order).to(dtype)[:, None]
    result = torch.zeros_like(hidden_states, dtype=dtype)
    return result.index_add(0, token, output).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(RAGGED, ragged_experts_forward)
