"""Llama 4 routing: one expert per token, which sees the token scaled by the sigmoid of its logit.

    l = W x        e = argmax l        y = FFN_e(sigmoid(l_e) x)

The weight stands on the input, before the expert's activation, and the output is taken whole.

Source: Transformers' `llama4`.
"""

import torch
from torch import nn
from transformers import initialization as init

from ..decisions import ExpertAssignment
from ..gating import apply_overrides, gate_logits, router_scores
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("llama4")
class Llama4Router(Router):
    """Sigmoid gate on the input, top-1 of E.

    Args:
        spec: facts of the layer; `num_experts_per_tok` must be 1.

    Raises:
        ValueError: if K is not 1.
    """

    def __init__(self, spec: MoELayerSpec):
        super().__init__(spec)
        if spec.num_experts_per_tok != 1:
            raise ValueError(
                f"Router 'llama4' of layer {spec.layer_idx} scales a token for the one expert that sees it, got "
                f"num_experts_per_tok={spec.num_experts_per_tok}: set it to 1, or take the router 'top_k'."
            )
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        # By the logit: in float32 the sigmoid of a large one is 1, as that of a larger one is.
        best, index = logits.max(-1, keepdim=True)  # (T, 1) both
        _, probs = router_scores(logits, "sigmoid")
        return ExpertAssignment(
            index,
            torch.ones_like(best),
            self.spec.num_experts,
            router_logits=logits,
            router_probs=probs,
            input_scale=best.sigmoid().squeeze(1),
        )
