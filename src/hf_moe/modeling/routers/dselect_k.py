"""DSelect-k: a differentiable gate that ends with at most K experts per token, without a top-k.

An expert is named by the m = ceil(log2 E) bits of its number. Each of K selectors s points at one expert, bit by bit:

    z = W_z x + b_z                      (K, m)        S(z) = 1/2 + u (3/2 - 2 u^2),  u = clamp(z / gamma, -1/2, 1/2)
    r_{s,i} = prod_b S(z_{s,b})  where bit b of i is 1,  1 - S(z_{s,b}) where it is 0                          (K, E)
    a = softmax(W_a x + b_a)             (K,)          q_i = sum_s a_s r_{s,i}                                 (E,)

S is smooth, and exactly 0 or 1 where |z| >= gamma / 2. At first all bits are near 1/2 and all experts run; where all
bits of a token are 0 or 1, each selector points at one expert. q sums to 1 if E is a power of two. Otherwise some
codes name no expert, and what a selector gives them is lost until training moves it away.

In training every expert with q_i > 0 runs. At inference the K experts with the largest q_i run, with weights that sum
to 1; that changes nothing once the bits are decided. No token depends on another. A token all of whose experts are
disabled by an override gets none.

The bits, and the shares of the selectors, may also be learnt for a whole modality or condition in place of being
computed from the token. Then a modality ends with K experts of its own.

Two losses of the paper, as signals of a token for the objective `signal`; balance is no part of the method:

    selector_entropy = - sum_{s,i} r_{s,i} log(r_{s,i} + 1e-6)      decides the bits
    unused_codes     = sum_s 1 / sum_{i < E} r_{s,i}                with coefficient 1, unless E is a power of 2

Source: DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning,
arXiv:2106.03760, and its released code.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive, PositiveInt
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, from_mask, gate_logits, renormalise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext


@register_router("dselect_k")
class DSelectKRouter(Router):
    """K smooth selectors over the binary codes of the experts.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is the number of selectors.
        gamma (`float`, *optional*, defaults to 1.0): width of the band in which a bit is undecided.
        conditioning (`str`, *optional*, defaults to `"token"`): what chooses the experts: the `"token"`, its
            `"modality"`, or a `"condition"` of its row.
        condition (`str`, *optional*, defaults to `"task"`): name of that condition in the call's `condition_ids`; a
            row whose id is not in [0, num_conditions) gets no expert.
        num_conditions (`int`, *optional*, defaults to 2): how many ids it has.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        gamma: Positive = 1.0,
        conditioning: Literal["token", "modality", "condition"] = "token",
        condition: str = "task",
        num_conditions: PositiveInt = 2,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "dselect_k")
        self.gamma = gamma
        self.conditioning = conditioning
        selectors, bits = spec.num_experts_per_tok, (spec.num_experts - 1).bit_length()
        if conditioning == "token":
            self.codes = nn.Parameter(torch.empty(selectors * bits, spec.hidden_size))
            self.codes_bias = nn.Parameter(torch.empty(selectors * bits))
            self.mix = nn.Parameter(torch.empty(selectors, spec.hidden_size))
            self.mix_bias = nn.Parameter(torch.empty(selectors))
            return
        self.reads = frozenset({conditioning})
        groups = NUM_MODALITIES
        if conditioning == "condition":
            self.condition, self.num_conditions = condition, num_conditions
            groups = num_conditions
        self.codes = nn.Parameter(torch.empty(groups, selectors * bits))
        self.mix = nn.Parameter(torch.empty(groups, selectors))

    def initialize(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            limit = self.gamma / 100 if name.startswith("codes") else 0.05
            init.uniform_(parameter, -limit, limit)

    def selectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Return where the selectors point, (N, K, E), by the logits (N, K * m) of their bits."""
        position = (codes.unflatten(-1, (self.spec.num_experts_per_tok, -1)) / self.gamma).clamp(-0.5, 0.5)
        ones = 0.5 + position * (1.5 - 2.0 * position.square())  # (N, K, m)
        pointed = torch.ones_like(ones[..., :1])
        for one in ones.split(1, dim=-1):  # the first bit is the highest of an expert's number
            pointed = torch.stack([pointed * (1.0 - one), pointed * one], dim=-1).flatten(-2)
        return pointed[..., : self.spec.num_experts]

    def group(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the modality or the condition of every token, (T,)."""
        if self.conditioning == "modality":
            return context.tokens("modality_ids", device)
        return context.condition(self.condition, device)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        if self.conditioning == "token":
            codes = gate_logits(hidden_states, self.codes, self.codes_bias)  # (T, K * m)
            mix = gate_logits(hidden_states, self.mix, self.mix_bias)  # (T, K)
        else:
            codes, mix = self.codes.float(), self.mix.float()
        pointed = self.selectors(codes)  # (N, K, E) for N tokens, or groups
        share = (mix.softmax(-1)[..., None] * pointed).sum(1)  # q (N, E)
        entropy = -(pointed * (pointed + 1e-6).log()).sum((-2, -1))  # (N,)
        unused = pointed.sum(-1).clamp(min=1e-6).reciprocal().sum(-1)  # (N,)
        unknown = None
        if self.conditioning != "token":
            group = self.group(context, hidden_states.device)
            unknown = (group < 0) | (group >= len(share))
            group = group.masked_fill(unknown, 0)
            share, entropy, unused = share[group], entropy[group], unused[group]
        logits = apply_overrides(share.clamp(min=1e-20).log(), self.spec, context)  # (T, E)
        weight = logits.exp()
        most = None if self.training else self.spec.num_experts_per_tok
        index, weight = from_mask((share > 0.0) & (weight > 0.0), weight, most)  # (T, E) both, or (T, K)
        decision = ExpertAssignment(
            index,
            weight if self.training else renormalise(weight),
            self.spec.num_experts,
            router_logits=logits,
            router_probs=logits.softmax(-1),
            signals={"selector_entropy": entropy, "unused_codes": unused},
        )
        return decision if unknown is None else decision.drop(unknown)
