"""Ming-Omni routing: one gate per modality over one common pool of experts.

    g = gate of the token's modality        the rest is an ordinary gate with W_g (and b_g)

Version 1 is a softmax gate with renormalised top-k. Version 2 has sigmoid scores, chooses by `score + b_g` after group
limiting, and weighs by the renormalised unbiased scores; every gate owns its bias, so balance is kept per modality:
`b_g += bias_update_rate * sign(mean load_g - load_g)` after every optimizer step.

All gates start as copies of the text gate, so that the model starts as the single-router model.

Source: Ming-Omni: A Unified Multimodal Model for Perception and Generation, arXiv:2506.09344, and its released code.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, Positive, PositiveInt
from ..bias_balancing import BiasBalancedRouter
from ..decisions import ExpertAssignment
from ..gating import assign, by_modality, check_groups, check_slots, gates_of, per_gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("ming_multi_router")
class MingMultiRouter(BiasBalancedRouter):
    """G gates of equal shape, `weight` (G, E, d), of which the token's modality picks one.

    Args:
        modalities: the modalities with a gate of their own, text first. Video shares the image gate unless it is
            named; any other modality without a gate shares the text gate.
        gate: `"softmax"` (version 1) or `"sigmoid_bias"` (version 2).
        routed_scaling_factor: multiplies the weights.
        n_group: number of expert groups; must divide E.
        topk_group: groups that a token may choose from.
        bias_update_rate: step of the biases of `"sigmoid_bias"`, >= 0; 0 freezes them.
        init_from_text_gate: start all gates as copies of the text gate.

    Raises:
        ValueError: if K, the groups or `modalities` do not fit.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        modalities: list[str] | tuple[str, ...] = ("text", "image", "audio"),
        gate: Literal["softmax", "sigmoid_bias"] = "softmax",
        routed_scaling_factor: Positive = 1.0,
        n_group: PositiveInt = 1,
        topk_group: PositiveInt = 1,
        bias_update_rate: NonNegative = 0.001,
        init_from_text_gate: bool = True,
    ):
        gate_of_modality = gates_of(modalities)
        rate = bias_update_rate if gate == "sigmoid_bias" else 0.0
        super().__init__(spec, (len(modalities), spec.num_experts), rate)
        check_slots(spec, spec.num_experts, "ming_multi_router")
        check_groups(spec, n_group, topk_group, "ming_multi_router")
        self.gate_of_modality = gate_of_modality
        self.score_function = "softmax" if gate == "softmax" else "sigmoid"
        self.routed_scaling_factor = routed_scaling_factor
        self.groups = (n_group, topk_group, "best_two")
        self.init_from_text_gate = init_from_text_gate
        self.weight = nn.Parameter(torch.empty(len(modalities), spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        if self.init_from_text_gate:
            text = torch.empty_like(self.weight[:1]).normal_(mean=0.0, std=std)
            init.copy_(self.weight, text.expand_as(self.weight))
        else:
            init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        gate_index = by_modality(self.gate_of_modality, context, hidden_states.device)  # (T,)
        return assign(
            per_gate_logits(hidden_states, self.weight, gate_index),  # (T, E)
            self.spec,
            context,
            scores=self.score_function,
            scale=self.routed_scaling_factor,
            bias=self.e_score_correction_bias[gate_index],  # (T, E)
            groups=self.groups,
            gate_index=gate_index,
        )
