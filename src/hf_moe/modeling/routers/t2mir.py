"""The token gate of T2MIR: two layers, and learnt noise in training.

    g = W2 tanh(W1 x)        h = g + eps * (softplus(W_n x) + noise_epsilon)        eps ~ N(0, 1), in training only
    S = the K largest of h   w = softmax of h over S

W_n (E, d) starts at zero. `router_probs` are the weights themselves, 0 for an expert that is not chosen, so that the
objective `mean_importance` is the squared coefficient of variation of the experts' importance, up to a constant:
`E sum_i m_i^2 = 1 + CV^2`. No token depends on another; a token takes `2 d E + E^2` multiply-adds, a linear gate d E.

The block `t2mir` has this gate beside another of tasks; it serves any other block as well.

Source: Mixture-of-Experts Meets In-Context Reinforcement Learning, arXiv:2506.05426.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegative
from ..decisions import ExpertAssignment
from ..gating import assign, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext
from ..tanh_gate import TanhGate


@register_router("t2mir")
class TokenGate(TanhGate):
    """Noisy top-k by a gate of two layers.

    Args:
        noise_epsilon (`float`, *optional*, defaults to 0.01): least standard deviation of the noise; `None` for a gate
            without noise.

    Raises:
        ValueError: if K does not lie in [2, E].
    """

    def __init__(self, spec: MoELayerSpec, *, noise_epsilon: NonNegative | None = 0.01):
        super().__init__(spec, "t2mir")
        self.noise_epsilon = noise_epsilon
        self.noise: nn.Parameter | None = None
        if noise_epsilon is not None:
            self.noise = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        if self.noise is not None:
            init.zeros_(self.noise)

    def idle_parameters(self) -> int:
        return 0 if self.noise is None else self.noise.numel()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = self.gate(hidden_states)  # (T, E)
        if self.training and self.noise is not None:
            deviation = F.softplus(gate_logits(hidden_states, self.noise)) + self.noise_epsilon
            logits = logits + torch.randn_like(logits) * deviation
        assignment = assign(logits, self.spec, context, masked=False)
        chosen = torch.zeros_like(F.pad(logits, (0, 1)))  # (T, E + 1), the last for empty slots
        chosen = chosen.scatter_add(1, assignment.expert_index, assignment.expert_weight)
        assignment.router_probs = chosen[:, :-1]
        return assignment
