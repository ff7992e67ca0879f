"""A gate of two layers with a tanh between: scores W2 tanh(W1 x), W1 (E, d) and W2 (E, E), in float32."""

import torch
from torch import nn
from transformers import initialization as init

from .gating import check_slots, gate_logits
from .layer_spec import MoELayerSpec
from .routing import Router


class TanhGate(Router):
    """Base of the routers that score by such a gate and divide the weights of the chosen experts by their sum.

    Args:
        spec: facts of the layer.
        name: of the mechanism, for errors.

    Raises:
        ValueError: if K does not lie in [2, E]: the one expert of a token would weigh 1, whatever the gate says.
    """

    def __init__(self, spec: MoELayerSpec, name: str):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, name)
        if spec.num_experts_per_tok < 2:
            raise ValueError(
                f"{name!r} of layer {spec.layer_idx} weighs the chosen experts against each other: set "
                "num_experts_per_tok to 2 or more."
            )
        self.gate_in = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.gate_out = nn.Parameter(torch.empty(spec.num_experts, spec.num_experts))

    def initialize(self, std: float) -> None:
        init.normal_(self.gate_in, mean=0.0, std=std)
        # Its inputs lie in [-1, 1], whatever the width of the model.
        init.normal_(self.gate_out, mean=0.0, std=self.spec.num_experts**-0.5)

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the scores (T, E) float32 of hidden states (T, d)."""
        return gate_logits(gate_logits(hidden_states, self.gate_in).tanh(), self.gate_out)
