"""Mixing vectors: a task weighs all experts, by numbers that are learnt for it.

    y = sum_i W[c, i] E_i(x)        c the task of the token's row, or the modality of the token

The map is linear: a weight may be negative, and they need not sum to 1. All tasks start from the mean of the experts.
Every expert runs on every token, so E is small. A row whose task is not known, an id outside of [0, num_conditions),
gets no expert. Nothing balances the experts, and training and inference are the same.

Source: Multi-Task Reinforcement Learning with Mixture of Orthogonal Experts, arXiv:2311.11385; the block `moore` makes
the outputs of the experts orthogonal.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, from_mask
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext


@register_router("moore")
class MixingVectorRouter(Router):
    """A vector (E,) for every task or modality, `mixing` (C, E); `num_experts_per_tok` is not read.

    Args:
        conditioning (`str`, *optional*, defaults to `"condition"`): what has a vector: a `"condition"` of the row, or
            the `"modality"` of the token.
        condition (`str`, *optional*, defaults to `"task"`): name of that condition in the call's `condition_ids`.
        num_conditions (`int`, *optional*, defaults to 2): how many ids it has.

    Raises:
        ValueError: if the condition has no name.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        conditioning: Literal["condition", "modality"] = "condition",
        condition: str = "task",
        num_conditions: PositiveInt = 2,
    ):
        super().__init__(spec)
        if not condition:
            raise ValueError("condition='' has no name, by which the call of the model could give it.")
        self.reads = frozenset({conditioning})
        if conditioning == "condition":
            self.condition, self.num_conditions = condition, num_conditions
        rows = num_conditions if conditioning == "condition" else NUM_MODALITIES
        self.mixing = nn.Parameter(torch.empty(rows, spec.num_experts))

    def initialize(self, std: float) -> None:
        init.constant_(self.mixing, 1.0 / self.spec.num_experts)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def idle_parameters(self) -> int:
        return self.mixing[1:].numel()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        device = hidden_states.device
        if self.condition is None:
            ids = context.tokens("modality_ids", device)  # (T,)
        else:
            ids = context.condition(self.condition, device)
        known = (ids >= 0) & (ids < len(self.mixing))
        weight = self.mixing.float()[ids.masked_fill(~known, 0)]  # (T, E)
        allowed = apply_overrides(torch.zeros_like(weight), self.spec, context).isfinite()
        return ExpertAssignment(*from_mask(allowed & known[:, None], weight), self.spec.num_experts)
