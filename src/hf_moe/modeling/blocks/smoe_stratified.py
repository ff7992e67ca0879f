"""Stratified mixture of experts: a token climbs the strata of a layer's experts, in more or fewer rounds.

    u_0 = x        round s = 0 .. L - 1, for the tokens that wait for it:
        z = norm_s(u), and x itself in round 0        S = the best K experts of strata >= s by gate s
        u <- u + sum_{i in S} w_i E_i(z)              the token waits for round j + 1, j the stratum of its best expert
    y = u - x

A token whose best expert is in the last stratum, L - 1, leaves. So it takes between 1 and L rounds, the signal
`rounds` (T,) of the first decision. A round costs the slots of the tokens that wait for it, and a gate and a norm of
all tokens. x is subtracted since the decoder layer adds its own residual. At inference the rounds are the same ones.

A balance loss counts in every round the tokens that wait for it and the experts that they see; layers and rounds have
equal weight in its mean. That hard tokens take more rounds is the paper's finding: in the toy of the tests the kinds
of tokens part, and the easy ones take more.

Source: Towards Being Parameter-Efficient: A Stratified Sparsely Activated Transformer with Dynamic Capacity,
arXiv:2305.02176.
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block import Block, Parts
from ..decisions import ExpertAssignment
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


@register_block("smoe_stratified")
class StratifiedMoE(Block):
    """A router for every stratum, and a norm for all except the first; the rounds' sites are `1`, `"1.round1"`, ...

    Args:
        spec: facts of the layer.
        strata: how many experts each of the L strata has, the first experts in the first stratum; two halves when
            absent.

    Raises:
        ValueError: if the strata do not sum to the number of experts, or the router does not read hidden states and so
            cannot choose among the experts of a round; in `forward`, if the router mixes experts.
    """

    def __init__(self, spec: MoELayerSpec, parts: Parts, *, strata: list[PositiveInt] | None = None):
        super().__init__(spec, parts)
        strata = strata or [spec.num_experts // 2, spec.num_experts - spec.num_experts // 2]
        if sum(strata) != spec.num_experts:
            raise ValueError(
                f"strata={strata} of layer {spec.layer_idx} must sum to num_experts={spec.num_experts}, the experts "
                "of all strata."
            )
        self.first_experts = [0, *accumulate(strata[:-1])]
        self.gate = nn.ModuleList()
        for number, first in enumerate(self.first_experts):
            # The first keeps the site of the layer, by which saved statistics and overrides know it.
            part = f"round{number}" if number else spec.part
            self.gate.append(parts.router(replace(spec, part=part, first_expert=first)))
        if len(strata) > 1 and "hidden_states" not in self.router.reads:
            raise ValueError(
                f"The router {self.router.mechanism_name!r} of layer {spec.layer_idx} does not read hidden states, "
                "and cannot choose anew among the experts of a later stratum: choose another, such as 'top_k'."
            )
        self.norms = nn.ModuleList(nn.LayerNorm(spec.hidden_size) for _ in strata[1:])
        self.experts = parts.experts(spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def initialize(self, std: float) -> None:
        for norm in self.norms:
            init.ones_(norm.weight)
            init.zeros_(norm.bias)

    def initialized_parts(self) -> list[nn.Module]:
        return [self, *self.norms]

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        waits_for = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)  # (T,)
        total, rounds = torch.zeros_like(tokens), torch.zeros(len(tokens), device=tokens.device)
        for number, gate in enumerate(self.gate):
            here = waits_for == number  # (T,)
            inputs = self.norms[number - 1](tokens + total) if number else tokens
            seen = context.narrowed(f"{self.spec.site}.round{number}", here) if number else context
            output, decision = self.route(gate, self.experts, inputs, seen)
            if not isinstance(decision, ExpertAssignment):
                raise ValueError(
                    f"The block 'smoe_stratified' of layer {self.layer_idx} needs a router that assigns experts; "
                    f"{type(decision).__name__} mixes them, and no token has a best one."
                )
            total, rounds = total + output, rounds + here
            waits_for = torch.where(here, self._next_round(decision), waits_for)
            if number == 0:
                first = decision
        first.signals["rounds"] = rounds
        return self.add_shared(total, tokens)

    def _next_round(self, decision: ExpertAssignment) -> torch.Tensor:
        """Return the round after the stratum of each token's best expert, (T,); L for a token without any."""
        slot = decision.expert_weight.argmax(-1, keepdim=True)  # (T, 1)
        best = decision.expert_index.gather(1, slot).squeeze(1)
        return torch.stack([best >= first for first in self.first_experts]).sum(0)
