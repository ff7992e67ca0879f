"""SMoRA routing: every rank of one LoRA, or every block of ranks, is an expert.

    s = sigmoid(R x)        I = the K largest of s + b        w_i = (s_i + b_i) / sum_{j in I} (s_j + b_j)

With `r = p` ranks per expert, E = rank / p and K = active ranks / p, the layer's `lora_alpha / r` times w is the
paper's `alpha / k` times its gate, whose mean over the active ranks is 1. The bias b follows the load after every
optimizer step, `b_i += rate * sign(mean load - load_i)`, and has no gradient.

Source: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning, arXiv:2501.15103,
and its released code.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative
from ..bias_balancing import BiasBalancedRouter
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, gate_logits, renormalise, router_scores, select_experts
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("smora")
class SmoraRouter(BiasBalancedRouter):
    """Sigmoid gate over ranks with a balancing bias that also weighs.

    Args:
        bias_update_rate: step of the bias, >= 0; 0 freezes it.
        bias_in_weights: weigh by `s + b` as in the released code; otherwise b moves the choice alone.
    """

    score_function = "sigmoid"

    def __init__(self, spec: MoELayerSpec, *, bias_update_rate: NonNegative = 1e-5, bias_in_weights: bool = True):
        super().__init__(spec, (spec.num_experts,), bias_update_rate)
        check_slots(spec, spec.num_experts, "smora")
        self.bias_in_weights = bias_in_weights
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        bound = self.spec.hidden_size**-0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        scores, probs = router_scores(logits, "sigmoid")
        bias = self.e_score_correction_bias
        if self.bias_in_weights:
            # A bias below -1 would turn a weight negative.
            index, weight = select_experts((scores + bias).clamp(min=0.0), logits, self.spec)  # (T, K) both
        else:
            index, weight = select_experts(scores, logits, self.spec, bias)
        return ExpertAssignment(
            index, renormalise(weight), self.spec.num_experts, router_logits=logits, router_probs=probs
        )
