"""Mixture of orthogonal experts: the outputs of a token's experts are made orthogonal before they are mixed.

    u_i = E_i(x) for i in S        v_i = u_i - sum_{j < i} <v_j, u_i> / (|v_j|^2 + eps |u_j|^2) v_j
    y = sum_{i in S} w_i v_i + shared(x)

S and w come from the router, or the task (`routers/moore.py`). Experts go in the order of their numbers, not of their
weights, so that a basis does not turn where two weights change places. The length of v_i is kept, and gradients pass
through all projections. An expert that repeats what those before it say has v_i = 0, and learns what they do not.
Projections are in float32 and one after the other, K (K - 1) / 2 of them for a token, of 4 d FLOPs each. The guard eps
is a share of |u_j|^2: fresh experts have outputs so small that an absolute one would leave them as they are.

With `mode="penalty"` the outputs are mixed as they are, and the signal `output_overlap` (T,) is the mean of
cos(u_i, u_j)^2 over pairs of a token's slots, for the objective `signal`.

The experts may be of any kind and run on any backend, in one dispatch; copies of T * K tokens reach them. Training and
inference are the same, and no token depends on another. Copies of one feed-forward f start as w_i f(x) of the first
expert i alone.

Source: Multi-Task Reinforcement Learning with Mixture of Orthogonal Experts, arXiv:2311.11385.
"""

from typing import Literal

import torch
from torch import nn

from ...configuration.checks import Positive
from ..block import Block, Parts
from ..decisions import ExpertAssignment
from ..expert_banks import slot_outputs
from ..gating import row_overlap
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


@register_block("moore")
class OrthogonalMoE(Block):
    """A router, experts whose outputs are made orthogonal, and the shared branch if the config has one.

    Args:
        spec: facts of the layer.
        mode: `"project"`, or `"penalty"` for the soft variant.
        eps: guards the projection onto a vector that is nearly zero.

    Raises:
        ValueError: in `forward`, if the router mixes or merges experts, which have no outputs of their own then.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        *,
        mode: Literal["project", "penalty"] = "project",
        eps: Positive = 1e-6,
    ):
        super().__init__(spec, parts)
        self.projects = mode == "project"
        self.eps = eps
        self.gate = parts.router(spec)
        self.experts = parts.experts(spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        output, decision = self.route(self.gate, self.experts, tokens, context)
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(
                f"The block 'moore' of layer {self.layer_idx} needs a router that assigns experts; "
                f"{type(decision).__name__} mixes them, and leaves no outputs to make orthogonal."
            )
        return self.add_shared(output, tokens)

    def combine(self, experts: nn.Module, tokens: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        index, order = assignment.expert_index.sort(dim=-1)  # (T, K) both; empty slots come last
        weight = assignment.expert_weight.gather(1, order)
        outputs = slot_outputs(experts, tokens, index, assignment.num_experts).float()  # (T, K, d)
        if self.projects:
            outputs = orthogonalised(outputs, self.eps)
        else:
            assignment.signals["output_overlap"] = row_overlap(outputs)
        return (outputs * weight[..., None]).sum(1).to(tokens.dtype)


def orthogonalised(outputs: torch.Tensor, eps: float) -> torch.Tensor:
    """Return vectors (T, K, d) in float32 made orthogonal to those before them, see above."""
    guards = eps * outputs.square().sum(-1, keepdim=True)  # (T, K, 1)
    basis, rest = [], outputs
    for guard in guards.split(1, dim=1):
        vector, rest = rest[:, :1], rest[:, 1:]  # (T, 1, d), and those after it
        length = (vector.square().sum(-1, keepdim=True) + guard).clamp(min=1e-30)  # (T, 1, 1)
        rest = rest - (rest * vector).sum(-1, keepdim=True) / length * vector
        basis.append(vector)
    return torch.cat(basis, dim=1)
