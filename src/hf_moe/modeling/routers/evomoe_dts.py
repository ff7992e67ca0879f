"""EvoMoE's dense-to-sparse gate: all experts run at first, and fewer as a temperature falls.

    l = W x        training:    g = softmax((l + Gumbel noise) / tau)        S = {e : g_e > c, or g_e the largest}
                   inference:   g = softmax(l)                               S = {argmax l}
    w_e = g_e for e in S, not renormalised

tau falls from `tau_max` to `tau_min` over the first `tau_decay` of the training, as the progress of `HfMoeTrainer`
tells, and stays there: tau_max (tau_min / tau_max)^p or, `"linear"`, tau_max + p (tau_min - tau_max). Where no trainer
tells it, progress is 0 in models of this library, and 1, the end, for LoRA experts on other hosts. From `hard_after`
on S holds the largest g_e alone. At inference no token depends on another.

Balance by `load_balance` with `shares: tokens`: E sum_e mean(g_e) mean(e in S). What comes before this gate, one
expert for all tokens and its masked copies, is a dense stage and the construction source `masked_copies`.

Source: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, arXiv:2112.14397, and
its released code.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, from_mask, gate_logits, gumbel_noise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("evomoe_dts")
class EvoMoEDtsRouter(Router):
    """Gumbel softmax with a falling temperature, and a threshold.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is not read: inference is top-1.
        tau_max (`float`, *optional*, defaults to 1.0): temperature at the start.
        tau_min (`float`, *optional*, defaults to 0.5): temperature at the end.
        tau_schedule (`str`, *optional*, defaults to `"exp"`): `"exp"` or `"linear"`.
        tau_decay (`float`, *optional*, defaults to 1.0): share of the training in which it falls.
        gate_threshold (`float`, *optional*, defaults to 0.001): c.
        hard_after (`float`, *optional*): share of the training after which one expert runs; never when absent.

    Raises:
        ValueError: if `tau_min` exceeds `tau_max`.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        tau_max: Positive = 1.0,
        tau_min: Positive = 0.5,
        tau_schedule: Literal["exp", "linear"] = "exp",
        tau_decay: Share = 1.0,
        gate_threshold: Share = 0.001,
        hard_after: Share | None = None,
    ):
        super().__init__(spec)
        if tau_min > tau_max:
            raise ValueError(
                f"Router 'evomoe_dts' of layer {spec.layer_idx}: the temperature falls, so tau_min={tau_min} must lie "
                f"in (0, tau_max={tau_max}]."
            )
        self.tau_max = tau_max
        self.tau_min = tau_min
        self.tau_schedule = tau_schedule
        self.tau_decay = tau_decay
        self.gate_threshold = gate_threshold
        self.hard_after = hard_after
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def most_experts_per_tok(self) -> int:
        return 1

    def temperature(self, progress: float) -> float:
        """Return tau at a progress of the training in [0, 1]."""
        done = 1.0 if progress >= self.tau_decay else progress / self.tau_decay
        if self.tau_schedule == "exp":
            return self.tau_max * (self.tau_min / self.tau_max) ** done
        return self.tau_max + done * (self.tau_min - self.tau_max)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        scores = (logits + gumbel_noise(logits)) / self.temperature(context.progress) if self.training else logits
        gate = scores.softmax(-1)  # (T, E)
        if self.training:
            chosen = F.one_hot(gate.argmax(-1), self.spec.num_experts).bool()
            if self.hard_after is None or context.progress < self.hard_after:
                chosen = chosen | (gate > self.gate_threshold)
            index, weight = from_mask(chosen, gate)  # (T, E) both
        else:
            weight, index = gate.max(-1, keepdim=True)  # (T, 1) both
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=gate)
