"""GRIN: experts are sampled in training, and the gate gets an estimate of the gradient of that (SparseMixer-v2).

For each of K slots in turn, with s = W x (E,), without the experts of the slots before:

    m = max_e s_e            kept: the experts with (m - s_e) / max(|s_e|, m) <= 2 jitter_eps
    p = softmax of the kept s                           a slot before does not count, so the weights need not sum to 1
    i ~ p in training, i = argmax s at inference        w = c p_i

c is 1 at inference and where i is the best expert. Where it is another one, c is 1 with probability heun_prob and else
1/3 (Heun's third-order rule). The gradient of w is that of p_i, without c: over all draws this estimates half of the
gradient of sum_e p_e L(p_e f_e), including what the choice itself contributes. With a small `jitter_eps` only near
ties are sampled: 1.05 of 16 experts are kept for unit-normal logits and the default.

At inference the choice is the argmax, and no token depends on another. Balance by the objective `load_balance`, whose
loads are those of all processes, as in the paper.

Sources: GRIN: GRadient-INformed MoE, arXiv:2409.12136; Transformers' `phimoe`.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Positive, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, gate_logits, gumbel_noise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("grin")
class GrinRouter(Router):
    """Sampled top-k, slot by slot.

    Args:
        spec: facts of the layer; the paper has K = 2. The rule of the second slot holds for further ones.
        jitter_eps (`float`, *optional*, defaults to 0.01): half of the relative gap to the best logit within which an
            expert may be drawn.
        heun_prob (`float`, *optional*, defaults to 0.25): how often the weight of another than the best expert is
            whole.
        sample_in_training (`bool`, *optional*, defaults to `True`): `False` takes the best expert in training too.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        jitter_eps: Positive = 0.01,
        heun_prob: Share = 0.25,
        sample_in_training: bool = True,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "grin")
        self.jitter_eps = jitter_eps
        self.heun_prob = heun_prob
        self.sample_in_training = sample_in_training
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def near_best(self, left: torch.Tensor) -> torch.Tensor:
        """Return the logits (T, E) of the experts that are near the best one of those left, -inf for all others."""
        best = left.detach().amax(-1, keepdim=True)  # (T, 1)
        gap = (best - left.detach()) / left.detach().abs().maximum(best)
        return left.masked_fill(gap > 2.0 * self.jitter_eps, float("-inf"))

    def slot(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the expert of a slot and its weight, (T, 1) both, by the logits (T, E) of those that are left."""
        none = (left == float("-inf")).all(-1, keepdim=True)  # (T, 1)
        kept = self.near_best(left).masked_fill(none, 0.0)
        probs = kept.softmax(-1)
        best = kept.argmax(-1, keepdim=True)
        index, weight = best, probs.gather(1, best)
        if self.training and self.sample_in_training:
            index = (kept.detach() + gumbel_noise(kept)).argmax(-1, keepdim=True)
            weight = probs.gather(1, index)
            whole = (index == best) | (torch.rand_like(weight) < self.heun_prob)
            weight = weight - (weight * (2.0 / 3.0)).detach().masked_fill(whole, 0.0)
        return index.masked_fill(none, self.spec.num_experts), weight.masked_fill(none, 0.0)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = apply_overrides(gate_logits(hidden_states, self.weight), self.spec, context)  # (T, E)
        left, slots = logits, []
        for _ in range(self.spec.num_experts_per_tok):
            index, weight = self.slot(left)
            slots.append((index, weight))
            left = left.scatter(1, index.clamp(max=self.spec.num_experts - 1), float("-inf"))
        indices, weights = zip(*slots, strict=True)
        return ExpertAssignment(
            torch.cat(indices, -1),
            torch.cat(weights, -1),
            self.spec.num_experts,
            router_logits=logits,
            router_probs=logits.softmax(-1),
        )
