"""Union of experts: the parts of one feed-forward as experts, chosen by every token, or choosing their data.

    P = softmax(W x)
    token:  token t takes its K best experts                                    w_{t,e} = P_{t,e}
    data:   expert e takes the C = ceil(f n) tokens of a row of n that have it among their K best, and then others,
            by the largest P_{t,e}                                              w_{t,e} = P_{t,e} if e takes t

The parts are cut along the inner width, as the source `copies` makes narrow experts: the output of an expert is E
times that of its part, so E P_{t,e} weighs the part. With K = E (and f = 1) under a uniform gate the sum is the
feed-forward. By data a load is C by construction, and a token has 0 to E experts; it is so in training and at
inference, within a row. That choice sees later tokens, so decoders refuse it.

Source: Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer, arXiv:2503.02495.
"""

from typing import Annotated, Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Interval
from ..admission import room, take_best
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, assign, check_slots, from_mask, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("uoe")
class UnionRouter(Router):
    """Softmax gate with plain probabilities.

    Args:
        spec (`MoELayerSpec`): facts of the layer.
        selection (`str`, *optional*, defaults to `"token"`): what is chosen: experts by every `"token"`, or `"data"`
            by every expert.
        expert_capacity_fraction (`float`, *optional*, defaults to 0.5): f.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    looks_ahead: bool

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        selection: Literal["token", "data"] = "token",
        expert_capacity_fraction: Annotated[float, Interval(0, 1, open_minimum=True)] = 0.5,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "uoe")
        self.looks_ahead = selection == "data"
        self.reads = frozenset({"hidden_states"} | ({"sequence"} if self.looks_ahead else set()))
        self.expert_capacity_fraction = expert_capacity_fraction
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts if self.looks_ahead else super().most_experts_per_tok()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        if not self.looks_ahead:
            return assign(logits, self.spec, context, norm=False, masked=False)
        logits = apply_overrides(logits, self.spec, context)
        probs = logits.softmax(-1)  # (T, E)
        wanted = torch.zeros_like(probs).scatter(1, probs.topk(self.spec.num_experts_per_tok, dim=-1).indices, 1.0)
        mask = context.token_mask.to(probs.device)  # (B, S)
        row = torch.arange(len(mask), device=mask.device)[:, None].masked_fill(~mask, len(mask)).flatten()  # (T,)
        capacity = (room(mask.sum(-1, keepdim=True), self.expert_capacity_fraction) * mask).flatten()  # (T,)
        chosen = take_best(probs.detach() + wanted, row, capacity) & (logits > float("-inf"))
        index, weight = from_mask(chosen, probs)
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)
