"""The base of routers that merge experts: one decision for a block of positions, from what its row has said before.

    v_b = mean of v_s over the real tokens s before block b        the first block reads the first token

So no decision sees a later token, and all tokens of a block share one merged expert. What is pooled is remembered
across decoding.
"""

import torch

from ..configuration.checks import PositiveInt
from .layer_spec import MoELayerSpec
from .routing import Router
from .routing_context import RoutingContext


class BlockPooledRouter(Router):
    """Base of the routers that merge experts.

    Args:
        block_size: how many real positions share a merged expert; `None` pools the whole row for all of its tokens,
            which shows a token the later ones: for encoders.
    """

    def __init__(self, spec: MoELayerSpec, block_size: PositiveInt | None):
        super().__init__(spec)
        self.block_size = block_size

    def most_experts_per_tok(self) -> int:
        return 1  # the merged one

    def pool_blocks(
        self, values: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pooled values (T, C) of every token's block, the first token of each (G,), and the block (T,).

        Args:
            values (`torch.Tensor` of shape `(T, C)`): float32.
        """
        mask = context.token_mask.to(values.device)  # (B, S)
        rows, length = mask.shape
        # The last column counts the real tokens.
        own = torch.cat([values, torch.ones_like(values[:, :1])], -1).view(rows, length, -1)
        own = own.masked_fill(~mask[..., None], 0.0)  # (B, S, C + 1)
        total = context.remember(self.spec.site, own).cumsum(1)  # (B, n + S, C + 1)
        sums, block = self._before(total, length)
        pooled = (sums[..., :-1] / sums[..., -1:].clamp(min=1)).flatten(0, 1)  # (T, C)
        # Blocks of a row are numbered on from those of the rows before it.
        row = torch.arange(rows, device=block.device)[:, None]
        used, group = (row * (block.max() + 1) + block).flatten().unique(return_inverse=True)  # (G,), (T,)
        token = torch.arange(len(group), device=group.device)
        first = torch.full_like(used, len(group)).scatter_reduce(0, group, token, "amin")  # (G,)
        return pooled, first, group

    def _before(self, total: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums (B, S, C + 1) that the last `length` tokens' blocks read, and these blocks (B, S)."""
        if self.block_size is None:
            whole = total[:, -1:].expand(-1, length, -1)
            return whole, torch.zeros(whole.shape[:2], dtype=torch.long, device=total.device)
        count = total[..., -1].contiguous()  # (B, n + S), of real tokens up to each
        block = ((count - 1).clamp(min=0) / self.block_size).long()
        read = (block * self.block_size).clamp(min=1)  # how many real tokens the block reads
        # The place of the last of them; padding alone has none.
        place = torch.searchsorted(count, read.to(count)).clamp(max=count.shape[1] - 1)[:, -length:]  # (B, S)
        return total.gather(1, place[..., None].expand(-1, -1, total.shape[-1])), block[:, -length:]
