"""A gate on the heads of a value projection.

    y_head = f(x)_head * tanh(sum_i g_i w_{i, head} . x)        for tokens with an expert; others pass unchanged

The gates start at zero, so tokens with an expert contribute nothing to attention at first while they take attention
mass: of all kinds of experts this is the one that changes the model at step 0, for those tokens.

Source: PILL: Plug Into LLM with Adapter Expert and Attention Gate, arXiv:2311.02126.
"""

import torch

from ...configuration.checks import PositiveInt
from ..stacks import Target
from .base import ExpertKind, TargetCall


class ValueGateExperts(ExpertKind):
    """Per-head tanh gates on the output of a value projection.

    Args:
        head_dim: width of a head; that of the host's attention when `None`.

    Raises:
        ValueError: if `head_dim` does not divide the width of the target's output, or is not known.
    """

    def __init__(self, target: Target, *, head_dim: PositiveInt | None = None):
        super().__init__(target)
        if head_dim is None:
            head_dim = target.head_dim
        if head_dim is None:
            raise ValueError(
                f"The attention around {target.name!r} does not tell the width of its heads: give the experts "
                "'value_gate' a head_dim."
            )
        if head_dim < 1 or target.out_features % head_dim:
            raise ValueError(
                f"The experts 'value_gate' gate whole heads: head_dim={head_dim} must divide the "
                f"{target.out_features} outputs of {target.name!r}."
            )
        self.head_dim = head_dim

    def tensors(self) -> dict[str, torch.Tensor]:
        heads = self.target.out_features // self.head_dim
        return {"vector": torch.zeros(self.target.num_experts, heads, self.target.in_features)}

    def forward(self, call: TargetCall) -> torch.Tensor:
        result, inputs, gates = call.run(call.x), call.prepare(call.x), call.decision.gates
        vectors = call.weights.vector
        scores = torch.einsum("td,ehd->teh", inputs.reshape(-1, inputs.shape[-1]), vectors)  # (T, E, heads)
        gate = torch.einsum("teh,te->th", scores, gates.to(scores.dtype)).tanh()
        gate = torch.where(gates.sum(-1, keepdim=True) > 0, gate, 1.0)
        heads = result.reshape(len(gate), -1, self.head_dim) * gate[..., None].to(result.dtype)
        return heads.view(result.shape)
