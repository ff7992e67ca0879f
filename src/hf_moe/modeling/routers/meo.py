"""Merging experts into one: the weights of the chosen experts are mixed, and one expert runs, whatever K is.

    z = mean of the tokens before a token's block        S = the K largest of W z        g = softmax over S of W z
    W_merged = sum_{e in S} g_e W_e                      y = W_merged x

A block is `block_size` real positions of a row, and the gate of its first block reads the first token. So no gate sees
a later token, and all tokens of a block share one merged expert. For one matrix that is the mixture of the experts'
outputs; for a feed-forward, whose activation comes after the merged first matrix, it is another model.

The gate is linear, so that the mean of the tokens' logits is the logit of their mean: the logits are what is
remembered across decoding.

Source: Merging Experts into One: Improving Computational Efficiency of Mixture of Experts, arXiv:2310.09832, which
pools whole sequences, for encoders: `block_size=None`.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ParameterMixture
from ..gating import apply_overrides, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("meo")
class MeoRouter(Router):
    """Top-k gate on what a row has said before a block, for experts that are merged.

    Args:
        block_size (`int`, *optional*, defaults to 32): how many positions share a merged expert; `None` pools the
            whole row for all of its tokens, which shows a token the later ones: for encoders.

    Raises:
        ValueError: if K does not lie in [1, E].
    """

    def __init__(self, spec: MoELayerSpec, *, block_size: PositiveInt | None = 32):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "meo")
        self.block_size = block_size
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ParameterMixture:
        mask = context.token_mask.to(hidden_states.device)  # (B, S)
        rows, length = mask.shape
        own = gate_logits(hidden_states, self.weight).view(rows, length, -1)  # (B, S, E)
        # The last column counts the real tokens.
        own = torch.cat([own, torch.ones_like(own[..., :1])], -1).masked_fill(~mask[..., None], 0.0)
        total = context.remember(self.spec.site, own).cumsum(1)  # (B, n + S, E + 1)
        pooled, block = self._pool(total, length)
        logits = (pooled[..., :-1] / pooled[..., -1:].clamp(min=1)).flatten(0, 1)  # (T, E)
        logits = apply_overrides(logits, self.spec, context)
        value, index = logits.topk(self.spec.num_experts_per_tok, dim=-1)  # (T, K) both
        gates = torch.zeros_like(logits).scatter(1, index, value.softmax(-1))
        # Blocks of a row are numbered on from those of the rows before it.
        row = torch.arange(rows, device=block.device)[:, None]
        used, group = (row * (block.max() + 1) + block).flatten().unique(return_inverse=True)  # (G,), (T,)
        token = torch.arange(len(group), device=group.device)
        first = torch.full_like(used, len(group)).scatter_reduce(0, group, token, "amin")  # (G,)
        return ParameterMixture(gates[first], group, self.spec.num_experts, router_logits=logits)

    def _pool(self, total: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums (B, S, E + 1) that the gates of the last `length` tokens read, and their blocks (B, S)."""
        if self.block_size is None:
            whole = total[:, -1:].expand(-1, length, -1)
            return whole, torch.zeros(whole.shape[:2], dtype=torch.long, device=total.device)
        count = total[..., -1].contiguous()  # (B, n + S), of real tokens up to each
        block = ((count - 1).clamp(min=0) / self.block_size).long()
        read = (block * self.block_size).clamp(min=1)  # how many real tokens the gate reads
        # The place of the last of them; padding alone has none.
        place = torch.searchsorted(count, read.to(count)).clamp(max=count.shape[1] - 1)[:, -length:]  # (B, S)
        return total.gather(1, place[..., None].expand(-1, -1, total.shape[-1])), block[:, -length:]
