"""MoIIE routing: experts for vision, experts for text, and experts for both.

    vision token:  p = softmax(W_vision x)  over the vision and inter-modality experts
    text token:    p = softmax(W_text x)    over the inter-modality and text experts
    S = the K largest of p        w_i = p_i / sum_{j in S} p_j        for i in S

The experts stand in the order vision, inter, text. Image and video tokens are vision, all others text. With
`boundary_rule="next_token"` (the released code) a vision token counts as vision only if the next one is vision too:
the last patch of a run predicts text and goes to the text gate. That looks one token ahead, so a prefill cut inside an
image would route its last patch differently; the default does not.

Source: MoIIE: Mixture of Intra- and Inter-Modality Experts for Large Vision Language Models, arXiv:2508.09779.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Share
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, is_vision, per_gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("moiie")
class MoIIERouter(Router):
    """Two softmax gates, text (0) and vision (1), `weight` (2, E, d), each over its own groups of experts, top-k.

    A gate's rows of the other modality's experts are never used.

    Args:
        group_fractions: share of the E experts that is vision-only, inter-modality and text-only; sums to 1.
        boundary_rule: `"none"`, or `"next_token"` as above.

    Raises:
        ValueError: if the fractions do not split E into whole groups, or a token would see fewer than K experts.
    """

    gate_of_modality = (0, 1, 1, 0)

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        group_fractions: list[Share] | tuple[Share, ...] = (0.25, 0.5, 0.25),
        boundary_rule: Literal["none", "next_token"] = "none",
    ):
        super().__init__(spec)
        sizes = [round(fraction * spec.num_experts) for fraction in group_fractions]
        rest = [fraction * spec.num_experts - size for fraction, size in zip(group_fractions, sizes, strict=True)]
        if len(sizes) != 3 or max(map(abs, rest)) > 1e-6 or sum(sizes) != spec.num_experts:
            raise ValueError(
                f"group_fractions={list(group_fractions)} [vision, inter, text] must split num_experts="
                f"{spec.num_experts} of layer {spec.layer_idx} into whole groups and sum to 1; the default needs a "
                "multiple of 4."
            )
        self.group_sizes = sizes
        check_slots(spec, sizes[1] + min(sizes[0], sizes[2]), "moiie")
        self.boundary_rule = boundary_rule
        self.weight = nn.Parameter(torch.empty(2, spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def counts_as_vision(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return which tokens take the vision gate, (T,) bool."""
        vision = is_vision(context, device).view(context.modality_ids.shape)  # (B, S)
        if self.boundary_rule == "next_token":
            vision = vision & F.pad(vision[:, 1:], (0, 1), value=False)
        return vision.reshape(-1)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        gate_index = self.counts_as_vision(context, hidden_states.device).long()  # (T,)
        expert = torch.arange(self.spec.num_experts, device=hidden_states.device)
        first_text = self.group_sizes[0] + self.group_sizes[1]
        closed = torch.stack([expert < self.group_sizes[0], expert >= first_text])  # (2, E)
        logits = per_gate_logits(hidden_states, self.weight, gate_index)  # (T, E)
        logits = logits.masked_fill(closed[gate_index], float("-inf"))
        return assign(logits, self.spec, context, gate_index=gate_index)
