"""The ways to compute a mixture of low-rank experts, and the choice between them.

    y = base + s * sum_i g_i B_i act(A_i x)        A (E, r, in), B (E, out, r)

*Dense*: all A as one product, times the gates, all B as another; the cost grows with E * r. *By rows*: tokens sorted
by expert, one product per expert and matrix; the cost grows with K * r. *Mixed slots*: every expert on its mixtures of
tokens. Without `act` the experts are LoRA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..modeling.decisions import ExpertAssignment, SlotMixture
from ..modeling.dispatch import Dispatch, compute_dtype, mix_slots
from ..modeling.routing_context import made_once
from .stacks import Weights


# The most bytes of a token's E * r inner states for which two plain matrix products are faster than sorted ones:
# E * r = 64 in float32, 128 in bfloat16.
MAX_DENSE_BYTES = 256

Activation = Callable[[torch.Tensor], torch.Tensor]


class SharedAssignment(ExpertAssignment):
    """An assignment in the forms that products need, each made once, however many targets share it."""

    # What the last targets got, and what for.
    _row_gates: tuple[Any, torch.Tensor] | None = None
    _rows: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, assignment: ExpertAssignment, device: torch.device | None = None) -> "SharedAssignment":
        """Return an assignment, with what scales the inputs in its weights, on `device` if it is given."""
        index, weight = assignment.expert_index, assignment.expert_weight
        if assignment.input_scale is not None:
            weight = weight * assignment.input_scale[:, None]
        if device is not None:
            index, weight = index.to(device), weight.to(device)
        return cls(index, weight, assignment.num_experts)

    @made_once
    def gates(self) -> torch.Tensor:
        """The weight of every expert in every token, (T, E)."""
        return self.weight_table()

    @made_once
    def dispatch(self) -> Dispatch:
        """The filled slots sorted by expert."""
        return Dispatch(self.expert_index, self.num_experts)

    def row_gates(self, rank: int, scaling: float, inner: torch.Tensor) -> torch.Tensor:
        """Return `gates` times the scaling, each for all rows of its expert, as the states `inner` (..., E * r)."""
        key = rank, scaling, inner.dtype, inner.shape
        if self._row_gates is None or self._row_gates[0] != key:
            gates = (self.gates.to(inner.dtype) * scaling).repeat_interleave(rank, dim=1)  # (T, E * r)
            self._row_gates = key, gates.view(inner.shape)
        return self._row_gates[1]

    def rows(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the inputs (..., in) by row, (M, in); gathered once for targets with the same inputs."""
        if self._rows is None or self._rows[0] is not inputs:
            self._rows = inputs, self.dispatch.rows(inputs.reshape(-1, inputs.shape[-1]).to(dtype))
        return self._rows[1]


def add_experts(
    result: torch.Tensor,
    inputs: torch.Tensor,
    weights: Weights,
    decision: SharedAssignment | SlotMixture,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Add the experts' output to that of the base layer, by the faster form.

    Args:
        result (`torch.Tensor` of shape `(..., out)`): the base layer's output, which sets the dtype.
        inputs (`torch.Tensor` of shape `(..., in)`): T tokens.
        weights: of the experts.
        decision: for the T tokens.
        activation: between A and B, on the last dimension.
    """
    shape = weights.b.shape
    total_rank = shape[1] if weights.ranks is not None else shape[0] * shape[2]
    if isinstance(decision, ExpertAssignment) and _runs_dense(inputs, total_rank, decision):
        return _add_dense(result, inputs, weights, decision, activation)
    if weights.ranks is not None:
        a, b = weights.ranks.pad(weights.a, weights.b)
        weights = Weights(a, b, scaling=weights.scaling)

    def compute(rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        inner = dispatch.linear(rows, weights.a)
        inner = inner if activation is None else activation(inner)
        if isinstance(decision, ExpertAssignment):
            weight = dispatch.slot_rows(decision.expert_weight)[:, None] * weights.scaling
        else:
            weight = weights.scaling
        return dispatch.linear((inner * weight).to(rows.dtype), weights.b)

    if isinstance(decision, SlotMixture):
        take, give = (part.to(inputs.device) for part in (decision.dispatch, decision.combine))
        order = None if decision.order is None else decision.order.to(inputs.device)
        output = mix_slots(compute, inputs.reshape(-1, inputs.shape[-1]), take, give, decision.num_experts, order)
        return result + output.view(result.shape).to(result.dtype)
    rows = compute(decision.rows(inputs, compute_dtype(inputs)), decision.dispatch)  # (M, out)
    return decision.dispatch.add(result.reshape(-1, result.shape[-1]), rows).view(result.shape)


def _runs_dense(inputs: torch.Tensor, total_rank: int, assignment: ExpertAssignment) -> bool:
    """Whether all experts, of this rank together, are computed for every token rather than sorted."""
    # Where every token uses every expert, sorting saves nothing.
    every_expert = assignment.expert_index.shape[1] >= assignment.num_experts
    return every_expert or total_rank * compute_dtype(inputs).itemsize <= MAX_DENSE_BYTES


def _add_dense(
    result: torch.Tensor,
    inputs: torch.Tensor,
    weights: Weights,
    assignment: SharedAssignment,
    activation: Activation | None,
) -> torch.Tensor:
    """Add the experts' output as two products over all experts, with the gates between them."""
    a, b, ranks = weights.a, weights.b, weights.ranks
    inner = F.linear(inputs, a.flatten(0, -2))  # (..., E * r)
    if activation is not None:
        inner = activation(inner if ranks is not None else inner.unflatten(-1, a.shape[:2]))
        inner = inner if ranks is not None else inner.flatten(-2)
    if ranks is not None:
        gates = assignment.gates.to(inner.dtype).index_select(1, ranks.expert).view_as(inner)
    else:
        gates = assignment.row_gates(b.shape[2], weights.scaling, inner)
        b = b.transpose(0, 1).flatten(1)
    output = F.linear(inner * gates, b)
    return result + (output if output.dtype is result.dtype else output.to(result.dtype))
