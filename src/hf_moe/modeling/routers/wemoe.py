"""WEMoE: a model and its fine-tuned copies are merged anew for every sequence, by weights that a gate gives.

    a = mean over tokens of r(h)     (n,)        W = W_0 + sum_{i=1..n} a_i (W_i - W_0)        y = FFN_W(x)

Expert 0 is the feed-forward W_0 of the pretrained model and expert i that of copy i, so E = n + 1, and the experts
weigh 1 - sum_i a_i, a_1, ..., a_n: any numbers, for there is no softmax. With K < E the K - 1 largest |a_i| are kept.
Experts stay frozen, the gate r alone is trained:

    2 layers: W_2 relu(W_1 h + b_1) + b_2        1 layer: W_2 h + b_2        0 layers: b_2

Two layers take 2 d (d + n) FLOPs of a token, where a linear gate takes 2 d n: at d 512 and E 64 nine times as many, in
six times the time of `top_k`.

W_1 and W_2 start small, b_1 at zero and b_2 at `init_lambda`, so that the model starts near task arithmetic of that
scale. `construction/weight_ensembles.py` makes a model of several, and `training/entropy.py` trains it without labels.

In a causal layer the weights of a block of positions come from the tokens before it, see [`BlockPooledRouter`]; the
paper pools whole inputs, of image encoders: `block_size=None`.

Source: Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, arXiv:2402.00433, and its released code.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block_pooling import BlockPooledRouter
from ..decisions import ParameterMixture
from ..gating import apply_overrides, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext


# The standard deviation of the fresh gate's weights.
GATE_STD = 0.01


@register_router("wemoe")
class WemoeRouter(BlockPooledRouter):
    """Weights of the fine-tuned copies, any numbers, from the mean of a gate over the tokens.

    Args:
        spec (`MoELayerSpec`): facts of the layer, E >= 2.
        router_hidden_layers (`int`, *optional*, defaults to 2): layers of the gate, 0 for constants.
        init_lambda (`float`, *optional*, defaults to 0.2): the weight of every copy at the start.
        block_size (`int`, *optional*, defaults to 32): how many positions share a merged expert; `None` pools the
            whole row for all of its tokens, which shows a token the later ones: for encoders.

    Raises:
        ValueError: if E is 1, or K does not lie in [1, E].
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        router_hidden_layers: Literal[0, 1, 2] = 2,
        init_lambda: float = 0.2,
        block_size: PositiveInt | None = 32,
    ):
        super().__init__(spec, block_size)
        check_slots(spec, spec.num_experts, "wemoe")
        if spec.num_experts < 2:
            raise ValueError(
                "The router 'wemoe' weighs the pretrained model and its copies: num_experts must be >= 2."
            )
        width, copies = spec.hidden_size, spec.num_experts - 1
        self.init_lambda = init_lambda
        self.hidden = nn.Linear(width, width) if router_hidden_layers == 2 else None
        self.output = nn.Linear(width, copies) if router_hidden_layers else None
        self.constant = None if router_hidden_layers else nn.Parameter(torch.empty(copies))

    def initialize(self, std: float) -> None:
        if self.hidden is not None:
            init.normal_(self.hidden.weight, mean=0.0, std=GATE_STD)
            init.zeros_(self.hidden.bias)
        if self.output is not None:
            init.normal_(self.output.weight, mean=0.0, std=GATE_STD)
        init.constant_(self.constant if self.output is None else self.output.bias, self.init_lambda)

    def copies(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what the gate says of every token, (T, n) float32."""
        if self.output is None:
            return self.constant.float().expand(len(hidden_states), -1)
        if self.hidden is not None:
            hidden_states = F.relu(gate_logits(hidden_states, self.hidden.weight, self.hidden.bias))
        return gate_logits(hidden_states, self.output.weight, self.output.bias)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ParameterMixture:
        pooled, first, group = self.pool_blocks(self.copies(hidden_states), context)  # (T, n), (G,), (T,)
        logits = apply_overrides(F.pad(pooled, (1, 0)), self.spec, context)  # (T, E)
        closed = logits[first] == float("-inf")
        weight = logits[first].masked_fill(closed, 0.0)[:, 1:]  # (G, n)
        if self.spec.num_experts_per_tok < self.spec.num_experts:
            kept = weight.abs().topk(self.spec.num_experts_per_tok - 1, dim=-1).indices
            weight = weight * torch.zeros_like(weight).scatter(1, kept, 1.0)
        weight = torch.cat([1.0 - weight.sum(-1, keepdim=True), weight], -1).masked_fill(closed, 0.0)
        return ParameterMixture(weight, group, self.spec.num_experts, router_logits=logits)
