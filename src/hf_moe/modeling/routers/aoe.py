"""Autonomy of experts: no router; the norm of an expert's own first activation decides.

    C_i = A_i x  for all E experts        p = softmax_i(||C_i||)        S = the K largest of p, w_i = p_i

A_i (r, d) is the first factor of the gate projection of expert i. The chosen experts go on from C_i (the experts
`aoe`), the others stop there. So a token takes T E d r multiply-adds here, r times those of a linear gate, of which
the chosen experts need not repeat theirs; C is a tensor (T, E, r), in float32 as all logits are. Expert i is taken
more often the larger A_i is, and no token depends on another, in training as at inference.

In a balance loss the probabilities are p, and so its gradient reaches A alone.

Source: Autonomy-of-Experts Models, arXiv:2501.13074.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("aoe")
class AutonomyRouter(Router):
    """The first factors of the experts `aoe`, and the choice by their norms.

    Args:
        d_low (`int`, *optional*, defaults to a third of d): r, as in the experts.
        norm_topk_prob (`bool`, *optional*, defaults to `False`): divide the K weights by their sum; without effect
            when K = 1.

    Raises:
        ValueError: if K does not lie in [1, E]; when the layer is built, if its experts do not go on from here.
    """

    def __init__(self, spec: MoELayerSpec, *, d_low: PositiveInt | None = None, norm_topk_prob: bool = False):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "aoe")
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.latent_size = d_low or max(1, spec.hidden_size // 3)
        self.gate_in_proj = nn.Parameter(torch.empty(spec.num_experts, self.latent_size, spec.hidden_size))  # A

    def initialize(self, std: float) -> None:
        init.normal_(self.gate_in_proj, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        latents = gate_logits(hidden_states, self.gate_in_proj.flatten(0, 1))  # (T, E * r)
        latents = latents.view(-1, self.spec.num_experts, self.latent_size)
        assignment = assign(latents.norm(dim=-1), self.spec, context, norm=self.norm_topk_prob, masked=False)
        assignment.latents = latents
        return assignment
