"""A gate of two layers.

    z = W_2 act(W_1 x + b_1) + b_2        p = softmax(z)        w_i = p_i / sum_{j in S} p_j for the K largest, S

x is the token, or with `prefix_mean` the mean of the tokens up to it, so that the gate is that of a sequence and sees
nothing later: what a sequence's tokens add to W_1 x is remembered beside the cache. A gate of h inner neurons costs
2 h (d + E) FLOPs a token, where a linear one costs 2 d E. With K = 1 the weight stays the plain probability.

- MoA for images: the token, two experts that are always both used.
- Attentive experts: the mean, act = tanh, h = 256, and an outer layer of zeros at first, so that experts start even.

Sources: MoA: Mixture-of-Attention for Subject-Context Disentanglement in Personalized Image Generation,
arXiv:2404.11565; A Mixture of h - 1 Heads is Better than h Heads, arXiv:2005.06537.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..pooling import PooledRouter
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("mlp")
class MLPRouter(PooledRouter):
    """Softmax gate of two layers, top-k of E.

    Args:
        gate_hidden_size (`int`, *optional*, defaults to a quarter of d): h.
        activation (`str`, *optional*, defaults to `"gelu"`): of the inner layer.
        gate_input (`str`, *optional*, defaults to `"token"`): x, or `"prefix_mean"`.
        norm_topk_prob (`bool`, *optional*, defaults to `True`): divide the K weights by their sum; without effect when
            K = 1.
        zero_init (`bool`, *optional*, defaults to `False`): whether the outer layer starts from zeros, and all experts
            as equals. Only for K = E: of equals, the same K would be chosen for all tokens.

    Raises:
        ValueError: if K does not lie in [1, E], or `zero_init` leaves experts out.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        gate_hidden_size: PositiveInt | None = None,
        activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
        gate_input: Literal["token", "prefix_mean"] = "token",
        norm_topk_prob: bool = True,
        zero_init: bool = False,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "mlp")
        if zero_init and spec.num_experts_per_tok < spec.num_experts:
            raise ValueError(
                f"Router 'mlp' of layer {spec.layer_idx}: zero_init sends all tokens to the same "
                f"{spec.num_experts_per_tok} of {spec.num_experts} experts: leave it out, or use all experts."
            )
        self.pooled = gate_input == "prefix_mean"
        self.reads = frozenset({"hidden_states", "sequence"} if self.pooled else {"hidden_states"})
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.zero_init = zero_init
        self.act_fn = ACT2FN[activation]
        width = gate_hidden_size or max(spec.hidden_size // 4, 1)
        self.inner_weight = nn.Parameter(torch.empty(width, spec.hidden_size))
        self.inner_bias = nn.Parameter(torch.empty(width))
        self.outer_weight = nn.Parameter(torch.empty(spec.num_experts, width))
        self.outer_bias = nn.Parameter(torch.empty(spec.num_experts))

    def initialize(self, std: float) -> None:
        init.normal_(self.inner_weight, mean=0.0, std=std)
        init.zeros_(self.inner_bias)
        init.normal_(self.outer_weight, mean=0.0, std=0.0 if self.zero_init else std)
        init.zeros_(self.outer_bias)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        inner = gate_logits(hidden_states, self.inner_weight)  # (T, h)
        if self.pooled:
            inner, _ = self.pool(inner, context)
        inner = self.act_fn(inner + self.inner_bias.float())
        logits = gate_logits(inner, self.outer_weight, self.outer_bias)  # (T, E)
        return assign(logits, self.spec, context, norm=self.norm_topk_prob, masked=False)
