"""Token-choice top-k routing: every token goes to the K experts whose gate scores are highest.

    s = softmax(W x), or the sigmoid of each        S = the K largest of s + b, in the best expert groups
    w_i = scale * s_i / sum_{j in S} s_j            for i in S

The base router that every other one is measured against. With K = 1 the weight stays the plain probability, since a
renormalised weight of 1 would give the gate no gradient.

- Switch Transformer: K = 1, a capacity, and a gate of small first values.
- V-MoE and LIMoE: the capacity is filled by score, highest first.
- SMAR: every modality m adds a bias of its own to the logits, W x + beta_m; EVE: an embedding to what the gate reads,
  W (x + b_m). The experts see x, and both choice and weight follow the sum.
- DeepSeekMoE: weights as they are. The rest of that design is not the router's: `granularity` m divides the width of
  an expert, `num_shared_experts` adds the branch that every token uses, so that (E, K) becomes (m E - shared, m K -
  shared) at equal cost.
- DeepSeek-V3: sigmoid scores, and a bias b that moves the choice and never the weight, has no gradient, and follows
  the load after every optimizer step: `b_i += bias_update_rate * sign(mean load - load_i)`. In models of many devices
  a token chooses among the `topk_group` best of `n_group` expert groups; a group's score is the sum of its two best
  experts, in DeepSeek-V2 it was that of the best one.

Sources: GShard, arXiv:2006.16668; Switch Transformers, arXiv:2101.03961; V-MoE, arXiv:2106.05974; Mixtral of Experts,
arXiv:2401.04088; DeepSeekMoE, arXiv:2401.06066; DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3 Technical Report,
arXiv:2412.19437; Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664; EVE,
arXiv:2308.11971; SMAR, arXiv:2506.06406.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, Positive, PositiveInt, Share
from ..bias_balancing import BiasBalancedRouter
from ..decisions import ExpertAssignment
from ..gating import assign, check_groups, check_slots, gate_logits, jitter, limit_capacity
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import NUM_MODALITIES, RoutingContext


@register_router("top_k")
class TopKRouter(BiasBalancedRouter):
    """Softmax or sigmoid gate, top-k of E.

    Args:
        score_function: `"softmax"` over the experts, or `"sigmoid"` of every expert by itself.
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1 and the choice has no bias.
        jitter_noise: while training, multiply the gate's input by uniform(1 - jitter_noise, 1 + jitter_noise).
        routed_scaling_factor: multiplies the weights (2.5 in DeepSeek-V3).
        capacity_factor: while training, an expert takes at most `ceil(capacity_factor * n * K / E)` slots of a
            sequence of n tokens; `None` drops nothing. Weights are renormalised before slots are emptied. At
            inference nothing is dropped: a token's output must not depend on how many came before it.
        capacity_order: who goes first: `"position"`, the earlier tokens; `"score"`, those with the highest score of
            their best expert (batch priority routing).
        bias_update_rate: step of the bias on the choice, >= 0; 0 freezes it, `None` leaves it out.
        n_group: number of expert groups (8 in DeepSeek-V3); must divide E.
        topk_group: groups that a token may choose from (4 in DeepSeek-V3).
        group_score: `"best_two"`: a group scores the sum of its two best experts; `"best"`: its best one.
        init_scale: the gate starts from a truncated normal with variance `init_scale / d`; from the model's
            `initializer_range` when `None`.
        modality_bias: what every modality adds: a trained bias to the `"logits"`, `modality_bias` (M, E), or a trained
            embedding to the `"input"` of the gate, (M, d); `None` for a gate that sees the hidden states alone.

    Raises:
        ValueError: if K does not lie in [1, E], or the groups do not fit.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk_prob: bool = True,
        jitter_noise: Share = 0.0,
        routed_scaling_factor: Positive = 1.0,
        capacity_factor: Positive | None = None,
        capacity_order: Literal["position", "score"] = "position",
        bias_update_rate: NonNegative | None = None,
        n_group: PositiveInt = 1,
        topk_group: PositiveInt = 1,
        group_score: Literal["best_two", "best"] = "best_two",
        init_scale: Positive | None = None,
        modality_bias: Literal["logits", "input"] | None = None,
    ):
        super().__init__(spec, None if bias_update_rate is None else (spec.num_experts,), bias_update_rate or 0.0)
        check_slots(spec, spec.num_experts, "top_k")
        check_groups(spec, n_group, topk_group, "top_k")
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob and (spec.num_experts_per_tok > 1 or bias_update_rate is not None)
        self.jitter_noise = jitter_noise
        self.routed_scaling_factor = routed_scaling_factor
        self.capacity_factor = capacity_factor
        self.capacity_order = capacity_order
        self.groups = (n_group, topk_group, group_score)
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.bias_of = modality_bias
        self.modality_bias: nn.Parameter | None = None
        if modality_bias is not None:
            width = spec.num_experts if modality_bias == "logits" else spec.hidden_size
            self.modality_bias = nn.Parameter(torch.empty(NUM_MODALITIES, width))
            self.reads |= {"modality"}
        if spec.num_experts == 1 and score_function == "softmax":
            self.reads = frozenset()  # the one expert always has all of it

    def initialize(self, std: float) -> None:
        super().initialize(std)
        if self.modality_bias is not None:
            init.normal_(self.modality_bias, mean=0.0, std=std)
        if self.init_scale is None:
            init.normal_(self.weight, mean=0.0, std=std)
        else:
            std = (self.init_scale / self.spec.hidden_size) ** 0.5
            init.trunc_normal_(self.weight, mean=0.0, std=std, a=-2 * std, b=2 * std)

    def idle_parameters(self) -> int:
        return 0 if self.modality_bias is None else self.modality_bias[1:].numel()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(jitter(hidden_states, self.jitter_noise, self.training), self.weight)  # (T, E)
        if self.modality_bias is not None:
            bias = self.modality_bias.float()
            bias = gate_logits(bias, self.weight) if self.bias_of == "input" else bias  # (M, E)
            logits = logits + bias[context.tokens("modality_ids", logits.device)]
        assignment = assign(
            logits,
            self.spec,
            context,
            scores=self.score_function,
            norm=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            bias=self.e_score_correction_bias,
            groups=self.groups,
            masked=False,
        )
        capacity_factor = self.capacity_factor if self.training else None
        return limit_capacity(assignment, capacity_factor, self.spec, context, self.capacity_order)
