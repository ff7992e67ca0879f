"""Grouped average pooling: a gate without parameters, for whom every expert is a group of features.

    l_e = mean of the features x_j with j in group e        p = softmax(l)        the K largest of p, as they are

The features are cut into E groups of neighbours, so the rows of this fixed gate are orthogonal: tokens without a
preferred direction choose every expert equally often, and there is nothing to learn or to send between devices.

The signal `gate_cosine` is delta, the cosine of a token and the row of its first choice. From it the authors bound the
share of a sequence's slots that an expert needs, from below, by `exp(delta^2 d / (2 - delta^2)) / E`; they measure
about 0.03, and shrink the capacity towards that bound.

Source: LocMoE: A Low-overhead MoE for Large Language Model Training, arXiv:2401.13920.
"""

import torch

from ...configuration.checks import Positive
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, limit_capacity
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("grap")
class GrapRouter(Router):
    """Top-k of E means; the paper has K = 1.

    Args:
        capacity_factor: while training, an expert takes at most `ceil(capacity_factor * n * K / E)` slots of a
            sequence of n tokens, earlier positions first; `None` drops nothing. Nothing is dropped at inference.

    Raises:
        ValueError: if K does not lie in [1, E], or E does not divide d.
    """

    def __init__(self, spec: MoELayerSpec, *, capacity_factor: Positive | None = None):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "grap")
        if spec.hidden_size % spec.num_experts:
            raise ValueError(
                f"Router 'grap' of layer {spec.layer_idx} gives every expert an equal group of features: num_experts="
                f"{spec.num_experts} must divide the width {spec.hidden_size} of what it reads."
            )
        self.capacity_factor = capacity_factor

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        grouped = hidden_states.float().unflatten(-1, (self.spec.num_experts, -1))  # (T, E, d / E)
        logits = grouped.mean(-1)  # (T, E)
        assignment = assign(logits, self.spec, context, norm=False, masked=False)
        best = logits.amax(-1) * grouped.shape[-1] ** 0.5  # (T,), against a row of length 1
        assignment.signals["gate_cosine"] = best / grouped.flatten(1).norm(dim=-1).clamp(min=1e-20)
        return limit_capacity(assignment, self.capacity_factor if self.training else None, self.spec, context)
