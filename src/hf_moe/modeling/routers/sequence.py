"""Sequence- and instruction-level routing: one gate for a sample, from the mean of what has been read of it.

    z_t = mean, or sum, over the counted tokens s <= t of W h_s / rms(h_s)        p = softmax(z_t / tau)
    S = the K largest of p        w_i = p_i / sum_{j in S} p_j

Over the instruction alone, with `end_token_id`, the gate is constant while the answer is written. With K = E all
experts are mixed; with K = 1 the weight stays the plain probability.

The division is this library's: in pretrained decoders the hidden state of the first token can be a hundred times as
long as the others. Left as it is, it alone would decide, for every sample alike, and with p at 0 or 1, where no
gradient moves the gate.

What all samples have in common says nothing about which expert is whose, but it is the larger part of a pooled state,
and lets one expert take them all. `centred` subtracts it: z - W m, with m the mean of the samples' pooled states,
averaged over the optimizer steps before and constant at inference.

Source: Octavius: Mitigating Task Interference in MLLMs via LoRA-MoE, arXiv:2311.02684.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, Positive
from ..decisions import Decision, ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..pooling import PooledRouter
from ..registry import register_router
from ..routing_context import RoutingContext
from ..running_statistics import finite, sum_over_ranks


# The share of the latest step in the mean, once there have been as many steps.
MEAN_RATE = 0.02


@register_router("sequence")
class SequenceRouter(PooledRouter):
    """Softmax gate on pooled hidden states, top-k of E; a token before the first counted one gets no expert.

    Args:
        modalities, end_token_id, end, pooling: what is pooled, and how, see [`PooledRouter`].
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1.
        temperature: tau.
        centred: subtract what the samples of the training have in common.
    """

    mean: torch.Tensor
    accumulated: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: NonNegativeInt | None = None,
        end: str = "last",
        pooling: str = "mean",
        norm_topk_prob: bool = True,
        temperature: Positive = 1.0,
        centred: bool = False,
    ):
        super().__init__(spec, modalities, end_token_id, end, pooling)
        check_slots(spec, spec.num_experts, "sequence")
        self.temperature = temperature
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.centred = centred
        if centred:
            self.register_buffer("mean", torch.zeros(spec.hidden_size, dtype=torch.float32))
            # Of the current step: the sum over its samples, and how many they are.
            self.register_buffer("accumulated", torch.zeros(spec.hidden_size + 1, dtype=torch.float32))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        for buffer in self.buffers():
            init.zeros_(buffer)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        directions = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:])  # (T, d)
        if self.centred:
            self.leave_samples(directions, context)
        logits, known = self.pool(gate_logits(directions, self.weight), context)  # (T, E)
        if self.centred:
            logits = logits - gate_logits(self.mean[None], self.weight)
        logits = logits / self.temperature
        return assign(logits, self.spec, context, norm=self.norm_topk_prob, masked=False).drop(~known)

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        super().accumulate(decision, context)
        left = self.left_samples(context)
        if left is not None:
            samples, known = left
            counted = torch.cat([samples, torch.ones_like(samples[:, :1])], dim=-1)  # (B, d + 1)
            summed = counted.masked_fill(~known[:, None], 0.0).sum(0)
            self.accumulated += finite(sum_over_ranks(summed)).to(self.accumulated)

    def end_step(self) -> None:
        if self.centred and self.accumulated[-1] > 0:
            self.steps += 1
            found = self.accumulated[:-1] / self.accumulated[-1]
            self.mean += (found - self.mean) * max(1 / int(self.steps), MEAN_RATE)
            self.accumulated.zero_()
