"""The base of routers that look at a whole sequence, or at its instruction, without looking ahead.

    pooled_t = mean, or sum, of v_s over the counted tokens s <= t

A token counts if it is real, of one of the named modalities, and not behind the end of the instruction. So the gate of
a token never sees a later one, padding or another row, and is the same whether the tokens before it were computed in
the same call or lie in a key-value cache. In encoders, where attention sees everything, all of the sequence is pooled.
"""

import torch

from ...modeling.gating import check_choice
from ...modeling.routing import MODALITIES, MoELayerSpec, Router, RoutingContext
from ..memory import PooledMemory


class PooledRouter(Router):
    """Base of the sequence-level routers.

    Args:
        spec: facts of the layer.
        modalities: which tokens are pooled, by modality; all when `None`.
        end_token_id: the token that ends the instruction, such as the first one of the answer's header: it is the last
            one to be pooled, and the gate is constant behind it. `None` pools everything.
        pooling: `"mean"` or `"sum"`.

    Raises:
        ValueError: if a modality or the pooling is unknown.
    """

    # Set by the tuner: whether the layer around the target hides later tokens from earlier ones.
    causal = True

    def __init__(
        self,
        spec: MoELayerSpec,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: int | None = None,
        pooling: str = "mean",
    ):
        super().__init__(spec)
        check_choice("pooling", pooling, ("mean", "sum"))
        self.pooling = pooling
        for name in modalities or ():
            check_choice("modalities", name, MODALITIES)
        self.modalities = None if modalities is None else [MODALITIES.index(name) for name in modalities]
        self.end_token_id = end_token_id

    def pool(self, values: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `values` (T, C) float32 pooled, (T, C), and whether any token was counted, (T,) bool."""
        mask = context.token_mask.to(values.device)  # (B, S)
        past = self._past(context)
        counted, closed = self._counted(mask, context, past)
        per_row = values.view(*mask.shape, -1).masked_fill(~counted[..., None], 0.0)  # (B, S, C)
        if self.causal:
            total, count = per_row.cumsum(1), counted.cumsum(1)
        else:
            total, count = (part.sum(1, keepdim=True).expand_as(part) for part in (per_row, counted.long()))
        if past is not None:
            total, count = total + past.total[:, None], count + past.count[:, None]
        memory = PooledMemory(total[:, -1].detach(), count[:, -1], closed)
        context.carry.setdefault("pooled", {})[self.spec.layer_idx] = memory
        pooled = total / count.clamp(min=1)[..., None] if self.pooling == "mean" else total  # (B, S, C)
        return pooled.flatten(0, 1), (count > 0).flatten()

    def _past(self, context: RoutingContext) -> PooledMemory | None:
        past = context.carry.get("past", {}).get(self.spec.layer_idx)
        if past is None and context.carry.get("cached_tokens", 0) > 0:
            raise ValueError(
                f"{type(self).__name__} pools all tokens so far, and the cache of this call holds tokens that were "
                "computed without this adapter: start from an empty cache."
            )
        if context.carry.get("hides_padding", False):
            raise ValueError(
                f"{type(self).__name__} must know what is padding, and this attention mask does not tell: give a 2-D "
                "one, or leave it to generate."
            )
        return past

    def _counted(
        self, mask: torch.Tensor, context: RoutingContext, past: PooledMemory | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens are pooled (B, S), and in which rows the instruction has ended (B,)."""
        counted = mask
        if self.modalities is not None:
            wanted = torch.tensor(self.modalities, device=mask.device)
            counted = counted & torch.isin(context.modality_ids.to(mask.device), wanted)
        closed = torch.zeros_like(mask[:, 0]) if past is None else past.closed
        if self.end_token_id is not None:
            if context.input_ids is None:
                raise ValueError(
                    f"end_token_id={self.end_token_id} is looked for in the input_ids, which this call did not give."
                )
            ends = (context.input_ids.to(mask.device) == self.end_token_id) & mask
            behind = (ends.cumsum(1) - ends.long()) > 0
            counted = counted & ~(behind | closed[:, None])
            closed = closed | ends.any(1)
        return counted, closed
