"""Dynamic top-p routing: a token uses as many experts as its router needs to be sure.

    P = softmax(W x)        e_1, e_2, ...  the experts in order of falling P
    S = {e_1, ..., e_k}     k the smallest with  P_{e_1} + ... + P_{e_k} > p
    w_i = P_i               for i in S

The expert that crosses the threshold belongs to S, so at least one always runs. A flat P takes many experts and a
sharp one few: a token that is hard to place gets more compute. The same rule holds in training and at inference, and
no token depends on another. The weights are plain probabilities, as in the released code.

It goes with the objectives `local_entropy`, the paper's dynamic loss, which sharpens P (without it the router is free
to satisfy p by spreading), and `load_balance`. The mean of k by layer and modality is the figure `active` of the
routing statistics.

Source: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv:2403.07652.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, gate_logits, renormalise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("dynamic_moe_top_p")
class DynamicMoETopPRouter(Router):
    """Softmax gate, the shortest prefix of the experts whose probability exceeds p.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is not read.
        top_p_threshold: p, in [0, 1]; 0 is top-1, 1 all experts.
        norm_topk_prob: divide the kept weights by their sum; a token with one expert then gives the gate no gradient.
        max_experts_per_tok: hard cap on the experts of a token, which may then keep less than p; E when `None`.

    Raises:
        ValueError: if `max_experts_per_tok` does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        top_p_threshold: Share = 0.4,
        norm_topk_prob: bool = False,
        max_experts_per_tok: PositiveInt | None = None,
    ):
        super().__init__(spec)
        self.max_experts_per_tok = spec.num_experts if max_experts_per_tok is None else max_experts_per_tok
        if not 1 <= self.max_experts_per_tok <= spec.num_experts:
            raise ValueError(
                f"Layer {spec.layer_idx}: max_experts_per_tok={max_experts_per_tok} must lie in [1, num_experts="
                f"{spec.num_experts}]."
            )
        self.top_p_threshold = top_p_threshold
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def most_experts_per_tok(self) -> int:
        return self.max_experts_per_tok

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        probs = logits.softmax(dim=-1)
        weight, index = probs.topk(self.max_experts_per_tok, dim=-1)  # (T, K) both
        before = F.pad(weight.detach().cumsum(dim=-1)[:, :-1], (1, 0))  # the mass of the better experts
        # Disabled experts, and those whose probability underflows, would cost a row and add nothing.
        empty = (before > self.top_p_threshold) | (weight == 0.0)
        weight = weight.masked_fill(empty, 0.0)
        return ExpertAssignment(
            index.masked_fill(empty, self.spec.num_experts),
            renormalise(weight) if self.norm_topk_prob else weight,
            self.spec.num_experts,
            router_logits=logits,
            router_probs=probs,
        )
