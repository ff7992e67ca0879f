"""Switch routing: one expert per token, with a capacity.

    p = softmax(W x)        e = argmax p        y = p_e FFN_e(x)

The weight is not renormalised, else the gate would have no gradient. While training, an expert takes at most
`ceil(capacity_factor * n / E)` tokens of a sequence of n tokens, earlier positions first; the others keep the residual
only. At inference nothing is dropped: a token's output must not depend on how many came before it.

Source: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv:2101.03961.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, gate_logits, jitter, limit_capacity, router_scores, select_experts
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("switch_transformer")
class SwitchTransformerRouter(Router):
    """Softmax gate, top-1 of E.

    Args:
        spec: facts of the layer; `num_experts_per_tok` must be 1.
        capacity_factor: of training; `None` drops nothing.
        jitter_noise: while training, multiply the gate's input by uniform(1 - jitter_noise, 1 + jitter_noise).
        init_scale: the gate starts from a truncated normal with variance `init_scale / d`.

    Raises:
        ValueError: if K is not 1.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        capacity_factor: Positive | None = 1.25,
        jitter_noise: Share = 0.01,
        init_scale: Positive = 0.1,
    ):
        super().__init__(spec)
        if spec.num_experts_per_tok != 1:
            raise ValueError(
                f"Router 'switch_transformer' of layer {spec.layer_idx} sends a token to one expert, got "
                f"num_experts_per_tok={spec.num_experts_per_tok}: set it to 1, or take the router 'top_k'."
            )
        self.capacity_factor = capacity_factor
        self.jitter_noise = jitter_noise
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        std = (self.init_scale / self.spec.hidden_size) ** 0.5
        init.trunc_normal_(self.weight, mean=0.0, std=std, a=-2 * std, b=2 * std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(jitter(hidden_states, self.jitter_noise, self.training), self.weight)  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        scores, probs = router_scores(logits, "softmax")
        index, weight = select_experts(scores, logits, self.spec)  # (T, 1) both
        assignment = ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)
        return limit_capacity(assignment, self.capacity_factor if self.training else None, self.spec, context)
