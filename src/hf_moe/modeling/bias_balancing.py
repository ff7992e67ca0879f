"""Routers that balance their experts by a bias on the choice, without a loss."""

import torch
from transformers import initialization as init

from .decisions import Decision, ExpertAssignment
from .layer_spec import MoELayerSpec
from .routing import Router
from .routing_context import RoutingContext
from .running_statistics import sum_over_ranks


class BiasBalancedRouter(Router):
    """Base of the routers that balance their experts by a bias on the choice (arXiv:2408.15664).

    After every optimizer step `b_i += rate * sign(mean load - load_i)`, load being the chosen slots of the whole step
    over micro-batches and processes. The bias has no gradient, is saved, and does not move at inference.

    Args:
        bias_shape: `(E,)`, or `(G, E)` where each of G gates has a bias of its own; `None` for no bias.
        bias_update_rate: the step, >= 0; 0 freezes the bias.
    """

    e_score_correction_bias: torch.Tensor | None
    load: torch.Tensor
    # What the bias is added to: scores of one kind are no measure for a bias on another.
    score_function = "softmax"

    def __init__(self, spec: MoELayerSpec, bias_shape: tuple[int, ...] | None, bias_update_rate: float):
        super().__init__(spec)
        self.bias_update_rate = bias_update_rate
        if bias_shape is None:
            self.e_score_correction_bias = None
            return
        self.register_buffer("e_score_correction_bias", torch.zeros(bias_shape, dtype=torch.float32))
        load = torch.zeros(bias_shape, dtype=torch.long).view(-1, spec.num_experts)  # (G, E)
        # Saved too: a checkpoint may be written between two micro-batches of a step.
        self.register_buffer("load", load)

    def initialize(self, std: float) -> None:
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)
            init.zeros_(self.load)

    @torch.no_grad()
    def start_from(self, old: Router) -> None:
        super().start_from(old)
        if isinstance(old, type(self)) or not isinstance(old, BiasBalancedRouter):
            return
        biased = old.e_score_correction_bias is not None and self.e_score_correction_bias is not None
        if biased and old.score_function == self.score_function:
            biases = old.e_score_correction_bias.view(-1, self.spec.num_experts)[list(old.gate_of_modality)]
            self._write_gates(self.e_score_correction_bias, biases)

    def balanced_together(self, load: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split `load` (G, E) along the experts into sets that share one mean load."""
        return (load,)

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        if self.bias_update_rate == 0.0 or not isinstance(decision, ExpertAssignment):
            return
        index = decision.expert_index
        group = decision.gate_index
        if group is None or len(self.load) == 1:
            group = torch.zeros_like(index[:, 0])
        counts = decision.slot_counts(group, len(self.load), context.tokens("token_mask", index.device))
        # Summed over processes at once: DDP overwrites buffers by those of its first process at every forward.
        self.load += sum_over_ranks(counts)

    def end_step(self) -> None:
        if self.bias_update_rate == 0.0:
            return
        # E * mean - E * load, in integers: a balanced expert must compare as exactly equal.
        ahead = [part.sum(-1, keepdim=True) - part * part.shape[-1] for part in self.balanced_together(self.load)]
        step = torch.cat(ahead, dim=-1).sign().view_as(self.e_score_correction_bias)
        self.e_score_correction_bias += self.bias_update_rate * step
        self.load.zero_()
