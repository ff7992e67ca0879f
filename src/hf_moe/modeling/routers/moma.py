"""MoMa: the experts of a token's modality choose it; at inference small routers of their own foretell the choice.

    s = sigmoid(W_m x)        expert e of modality m takes the ceil(f T_m / E_m) tokens of m with the largest s_e
    w_{t,e} = s_{t,e}         if e takes t
    a = sigmoid(A_m silu(B_m x))        at inference e takes t if a_{t,e} > 1/2

T_m are the real tokens of the modality in the batch of a process, E_m its experts: with f = 1 they compute as much as
one of them for every token. A token has 0 to E_m experts, and loads are even, without a balance loss. The choice looks
at the whole batch, so it is made in training alone: at inference a token's experts depend on nothing else.

The auxiliary routers A (E, d / 2) and B (one of (d / 2, d) for each modality) learn from the true choice by a binary
cross-entropy, the mean over the experts of the token's modality, reported as the signal `choice_loss` for the
objective `signal`. It reaches nothing but A and B. The paper trains them afterwards: freeze all but the `choice_`
parameters, and go on training; in training beside the model they follow it, and change nothing in it. They take
2 T d (d + E / 2) operations, for B of both modalities, where the gate takes 2 T d E.

Source: MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts, arXiv:2407.21770.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive
from ..admission import group_sizes, room, take_best
from ..decisions import ExpertAssignment
from ..gating import (
    apply_overrides,
    bank_sizes,
    from_mask,
    gate_logits,
    is_vision,
    mask_other_bank,
    per_gate_logits,
    router_scores,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("moma")
class MomaRouter(Router):
    """Expert choice within the bank of a modality: text and audio, or images and videos.

    Args:
        spec (`MoELayerSpec`): facts of the layer; its banks are the experts of text and of vision, half of them each
            where it has none. K does not matter.
        capacity_factor (`float`, *optional*, defaults to 1.0): f.
        gumbel_noise (`bool`, *optional*, defaults to `False`): while training, add the difference of two Gumbel
            variables to the logits, so that experts that start as copies grow apart.

    Raises:
        ValueError: if the layer has banks, and not two of them.
    """

    reads = frozenset({"hidden_states", "modality", "sequence"})

    def __init__(self, spec: MoELayerSpec, *, capacity_factor: Positive = 1.0, gumbel_noise: bool = False):
        super().__init__(spec)
        self.bank_sizes = bank_sizes(spec, "moma")
        self.capacity_factor = capacity_factor
        self.gumbel_noise = gumbel_noise
        inner = max(1, spec.hidden_size // 2)
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.choice_in = nn.Parameter(torch.empty(2, inner, spec.hidden_size))
        self.choice_out = nn.Parameter(torch.empty(spec.num_experts, inner))

    def initialize(self, std: float) -> None:
        for weight in (self.weight, self.choice_in, self.choice_out):
            init.normal_(weight, mean=0.0, std=std)

    def most_experts_per_tok(self) -> int:
        return max(self.bank_sizes)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        bank = is_vision(context, hidden_states.device).long()  # (T,)
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        if self.training and self.gumbel_noise:
            first, second = logits.new_empty(2, *logits.shape).exponential_().log()
            logits = logits + first - second
        logits = apply_overrides(mask_other_bank(logits, bank, self.bank_sizes), self.spec, context)
        scores, probs = router_scores(logits, "sigmoid")
        inner = F.silu(per_gate_logits(hidden_states.detach(), self.choice_in, bank))  # (T, d / 2)
        foretold = gate_logits(inner, self.choice_out)  # (T, E)
        may_choose = logits > float("-inf")
        learns = self.training or context.labelled is not None
        best = self.choice(scores, bank, context) & may_choose if learns else None
        chosen = best if self.training else (foretold > 0.0) & may_choose
        index, weight = from_mask(chosen, scores, self.most_experts_per_tok())
        decision = ExpertAssignment(
            index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs, gate_index=bank
        )
        if best is not None:
            loss = F.binary_cross_entropy_with_logits(foretold, best.float(), reduction="none")  # (T, E)
            decision.signals["choice_loss"] = (loss * may_choose).sum(-1) / may_choose.sum(-1).clamp(min=1)
        return decision

    def choice(self, scores: torch.Tensor, bank: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return which tokens of the batch every expert would take, (T, E) bool."""
        real = context.tokens("token_mask", bank.device)
        group = bank.masked_fill(~real, 2)
        text, vision = (room(group_sizes(group), self.capacity_factor / size) for size in self.bank_sizes)  # (T,) both
        return take_best(scores, group, torch.where(bank == 1, vision, text).masked_fill(~real, 0.0))
