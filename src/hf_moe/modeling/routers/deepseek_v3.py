"""DeepSeek-V3 routing: sigmoid scores, a bias that balances the choice, and group-limited selection.

    s = sigmoid(W x)        S = the K largest of s + b among the `topk_group` best of `n_group` expert groups
    w_i = routed_scaling_factor * s_i / (sum_{j in S} s_j)        for i in S

The bias b moves the choice and never the weight, has no gradient, and follows the load after every optimizer step:
`b_i += bias_update_rate * sign(mean load - load_i)`. A group's score is the sum of its two best experts; in
DeepSeek-V2 it was that of the best one.

Sources: DeepSeek-V3 Technical Report, arXiv:2412.19437; Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts, arXiv:2408.15664; DeepSeek-V2, arXiv:2405.04434.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, Positive, PositiveInt
from ..decisions import ExpertAssignment
from ..gating import (
    BiasBalancedRouter,
    apply_overrides,
    check_groups,
    check_slots,
    gate_logits,
    renormalise,
    router_scores,
    select_experts,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("deepseek_v3")
class DeepseekV3Router(BiasBalancedRouter):
    """Sigmoid gate with a balancing bias, group-limited top-k.

    Args:
        spec: facts of the layer.
        score_function: `"sigmoid"` of every expert by itself, or `"softmax"` over the experts.
        norm_topk_prob: divide the K weights by their sum.
        routed_scaling_factor: multiplies the weights (2.5 in the 671B model).
        n_group: number of expert groups (8 in the 671B model); must divide E.
        topk_group: groups that a token may choose from (4 in the 671B model).
        group_score: `"best_two"`: a group scores the sum of its two best experts; `"best"`: its best one.
        bias_update_rate: step of the bias, >= 0; 0 freezes it.

    Raises:
        ValueError: if K or the groups do not fit.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        score_function: Literal["sigmoid", "softmax"] = "sigmoid",
        norm_topk_prob: bool = True,
        routed_scaling_factor: Positive = 1.0,
        n_group: PositiveInt = 1,
        topk_group: PositiveInt = 1,
        group_score: Literal["best_two", "best"] = "best_two",
        bias_update_rate: NonNegative = 0.001,
    ):
        super().__init__(spec, (spec.num_experts,), bias_update_rate)
        check_slots(spec, spec.num_experts, "deepseek_v3")
        check_groups(spec, n_group, topk_group, "deepseek_v3")
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.group_score = group_score
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        scores, probs = router_scores(logits, self.score_function)
        index, weight = select_experts(
            scores, logits, self.spec, self.e_score_correction_bias, self.n_group, self.topk_group, self.group_score
        )  # (T, K) both
        weight = renormalise(weight) if self.norm_topk_prob else weight
        weight = weight * self.routed_scaling_factor
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)
