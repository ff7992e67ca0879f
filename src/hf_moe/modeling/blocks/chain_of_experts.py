"""Chain of experts: the experts of one layer are applied several times in sequence, each time newly routed.

    x_0 = input        x_t = x_{t-1} + sum_{i in S_t} g_{t,i} E_i(x_{t-1}) + shared(x_{t-1})        y = x_C - x_0

S_t are the K / C experts that the router of iteration t picks. The experts are the same in every iteration, so as many
are active as in one shot of top-K, and a pair of experts makes a composition. x_0 is subtracted since the decoder
layer adds its own residual: experts that return zero leave the identity.

Source: Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models, arXiv:2506.18945.
"""

from dataclasses import replace

import torch
from torch import nn

from ...configuration.checks import PositiveInt
from ..block import Block, Parts, run_experts
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


@register_block("chain_of_experts")
class ChainOfExperts(Block):
    """C rounds of routing over one set of experts; the sites of the rounds are `1`, `"1.step1"`, `"1.step2"`, ...

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is K, over all iterations.
        num_iterations: C, which must divide K.
        independent_routers: a decision of its own for every iteration; `False` repeats the first one's (an ablation of
            the paper, clearly worse).
        inner_residual: add x_{t-1} in every iteration; `False` leaves it out, so that y = x_C and the decoder layer
            adds x_0 once (an ablation of the paper, worse).

    Raises:
        ValueError: if C does not divide K.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        *,
        num_iterations: PositiveInt = 2,
        independent_routers: bool = True,
        inner_residual: bool = True,
    ):
        super().__init__(spec, parts)
        if spec.num_experts_per_tok % num_iterations:
            raise ValueError(
                f"num_iterations={num_iterations} must divide num_experts_per_tok={spec.num_experts_per_tok} of layer "
                f"{spec.layer_idx}, the experts that a token uses over all iterations."
            )
        slots = spec.num_experts_per_tok // num_iterations
        self.num_iterations = num_iterations
        self.inner_residual = inner_residual
        self.shared_runs = num_iterations
        self.runs_per_decision = 1 if independent_routers else num_iterations
        self.gate = nn.ModuleList()
        for step in range(num_iterations if independent_routers else 1):
            # The first keeps the site of the layer, by which saved statistics and overrides know it.
            part = f"step{step}" if step else spec.part
            self.gate.append(parts.router(replace(spec, part=part, num_experts_per_tok=slots)))
        self.experts = parts.experts(spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        state, decision = tokens, None
        for step in range(self.num_iterations):
            if step < len(self.gate):
                output, decision = self.route(self.gate[step], self.experts, state, context)  # (T, d)
            else:
                output = run_experts(self.experts, state, decision)
            output = self.add_shared(output, state)
            state = state + output if self.inner_residual else output
        return state - tokens if self.inner_residual else state
