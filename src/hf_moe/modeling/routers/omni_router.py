"""Omni-router: one gate for all MoE layers.

    p_l = softmax(W h_l)        the K largest of p_l        W the same in every layer

Every layer decides anew, by its own hidden states; what is shared is the function, so that expert e stands for the
same direction of the residual stream everywhere, and experts of one number specialise together.

Source: Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition, arXiv:2507.05724.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router, SharedPart
from ..routing_context import RoutingContext


class SharedGate(SharedPart):
    """The gate `weight` (E, d) of all layers: `forward(hidden (T, d)) -> (T, E)` float32."""

    def __init__(self, num_experts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return gate_logits(hidden_states, self.weight)


@register_router("omni_router")
class OmniRouter(Router):
    """Softmax top-k by a gate that the model holds.

    Args:
        spec: facts of the layer; the paper has K = 1.
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1.

    Raises:
        ValueError: if K does not lie in [1, E]; when the model is built, if its layers differ in E or d.
    """

    def __init__(self, spec: MoELayerSpec, *, norm_topk_prob: bool = True):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "omni_router")
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1

    @classmethod
    def shared_part(cls, routers: Sequence[Router]) -> SharedGate:
        sizes = {(router.spec.num_experts, router.spec.hidden_size) for router in routers}
        if len(sizes) > 1:
            raise ValueError(
                "The router 'omni_router' is one gate for all MoE layers, which therefore need one number of experts "
                f"and one width; got {sorted(sizes)}. Give the other layers another router."
            )
        return SharedGate(*sizes.pop())

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = self.shared(context)(hidden_states)  # (T, E)
        return assign(logits, self.spec, context, norm=self.norm_topk_prob, masked=False)
