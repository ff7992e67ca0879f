"""DeepSeekMoE routing: many fine-grained experts beside shared ones, weights as they are.

    y = sum_{shared} FFN_i(x) + sum_{i in S} s_i FFN_i(x)        s = softmax(W x),  S = the K largest of s

The gate knows the routed experts only. The selected weights are not renormalised in this version of the family. The
rest of the design is not the router's: `granularity` m divides the width of an expert, `num_shared_experts` adds the
branch that every token uses, so that (E, K) becomes (m E - shared, m K - shared) at equal cost.

Source: DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models, arXiv:2401.06066.
"""

import torch
from torch import nn
from transformers import initialization as init

from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, gate_logits, renormalise, router_scores, select_experts
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("deepseekmoe")
class DeepseekMoERouter(Router):
    """Softmax gate over the routed experts, top-k without renormalisation.

    Args:
        spec: facts of the layer.
        norm_topk_prob: divide the K weights by their sum, as later members of the family do.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(self, spec: MoELayerSpec, *, norm_topk_prob: bool = False):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "deepseekmoe")
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        scores, probs = router_scores(logits, "softmax")
        index, weight = select_experts(scores, logits, self.spec)  # (T, K) both
        weight = renormalise(weight) if self.norm_topk_prob else weight
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)
