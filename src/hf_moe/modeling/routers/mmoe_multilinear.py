"""The gate of multilinear mixtures of experts: every token weighs all experts, and most of them with an exact zero.

    a = entmax_1.5(norm(W x))        norm: to mean 0 and variance 1 over the E logits of a token, without parameters

    entmax_1.5(z)_i = max(z_i / 2 - tau, 0)^2        tau such that the sum is 1

A token uses every expert with a_i > 0, and weighs it by a_i: any experts can stand behind this gate, and those of the
kind `mmoe_multilinear` do at a cost that hardly grows with E. The gate starts at zero, where all experts weigh the
same. No token depends on another, in training as at inference. No loss balances the experts.

The paper normalises each expert's logit over the batch. Over the experts of one token instead, decoding needs no
statistics; two experts would then be one-hot at once, so E is at least 3 for entmax.

Sources: Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization, arXiv:2402.12550; Sparse
Sequence-to-Sequence Models, arXiv:1905.05702 (entmax).
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ..decisions import ExpertAssignment
from ..gating import apply_overrides, from_mask, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("mmoe_multilinear")
class MultilinearRouter(Router):
    """A gate with weights for all experts.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is not read.
        gate_activation: `"entmax15"`, whose weights have exact zeros, or `"softmax"`.

    Raises:
        ValueError: if entmax has fewer than 3 experts.
    """

    def __init__(self, spec: MoELayerSpec, *, gate_activation: Literal["entmax15", "softmax"] = "entmax15"):
        super().__init__(spec)
        if gate_activation == "entmax15" and spec.num_experts < 3:
            raise ValueError(
                f"Layer {spec.layer_idx}: gate_activation='entmax15' needs at least 3 experts, got num_experts="
                f"{spec.num_experts}: choose 'softmax' for fewer."
            )
        self.activation = gate_activation
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.zeros_(self.weight)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        logits = F.layer_norm(gate_logits(hidden_states, self.weight), (experts,))  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        probs = entmax15(logits) if self.activation == "entmax15" else logits.softmax(-1)
        index, weight = from_mask(probs > 0.0, probs)
        return ExpertAssignment(index, weight, experts, router_logits=logits, router_probs=probs)


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Return the 1.5-entmax of logits (T, E), exact by sorting; a logit of -inf gives 0."""
    # One that is 2 or more below the largest is 0 whatever the others are.
    half = ((logits - logits.detach().amax(-1, keepdim=True)) / 2).clamp(min=-1.0)
    order = half.detach().sort(dim=-1, descending=True).values
    count = torch.arange(1, order.shape[-1] + 1, device=order.device, dtype=order.dtype)
    mean = order.cumsum(-1) / count
    variance = order.square().cumsum(-1) / count - mean.square()
    bound = mean - (1.0 / count - variance).clamp(min=0.0).sqrt()  # tau, if so many are above zero
    support = (bound <= order).sum(-1, keepdim=True)
    tau = bound.gather(-1, support - 1)
    root = (half.detach() - tau).clamp(min=0.0)
    # The sum stays 1 as the logits move, which is all of the gradient that tau has.
    moved = (root * (half - half.detach())).sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
    return (half - (tau + moved)).clamp(min=0.0).square()
