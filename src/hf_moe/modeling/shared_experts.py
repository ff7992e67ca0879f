"""The branch of a MoE layer that every token uses."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .clamped_unit import ClampedUnit
from .layer_spec import MoELayerSpec


class SharedExperts(nn.Module):
    """The experts that every token uses, kept as one feed-forward of their total width.

    With a gate the output is multiplied by `sigmoid(w . x)` per token, computed in float32. The routed experts hand
    over its gated `unit`, which is clamped where theirs is.
    """

    def __init__(self, spec: MoELayerSpec, intermediate_size: int, gate: bool, unit: ClampedUnit):
        super().__init__()
        if spec.gated:
            self.gate_proj = nn.Linear(spec.hidden_size, intermediate_size, bias=spec.bias)
        self.up_proj = nn.Linear(spec.hidden_size, intermediate_size, bias=spec.bias)
        self.down_proj = nn.Linear(intermediate_size, spec.output_size or spec.hidden_size, bias=spec.bias)
        self.shared_expert_gate = nn.Linear(spec.hidden_size, 1, bias=False) if gate else None
        self.act_fn = ACT2FN[spec.hidden_act]
        self.gated = spec.gated
        self.unit = unit

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the branch before its gate."""
        up = self.up_proj(hidden_states)
        if not self.gated:
            return self.down_proj(self.act_fn(up))
        gate = self.gate_proj(hidden_states)
        return self.down_proj(self.unit(self.act_fn, gate, up))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.feed_forward(hidden_states)
        if self.shared_expert_gate is not None:
            output = output * torch.sigmoid(self.shared_expert_gate(hidden_states).float()).to(output.dtype)
        return output

    def tp_plan(self) -> dict[str, str]:
        """Return how Transformers splits the branch by its width."""
        plan = {"up_proj": "colwise", "down_proj": "rowwise"}
        return plan | {"gate_proj": "colwise"} if self.gated else plan
