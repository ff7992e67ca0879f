"""The base of routers that look at a whole sequence, or at its instruction, without looking ahead.

    pooled_t = mean, or sum, of v_s over the counted tokens s <= t

A token counts if it is real, of one of the named modalities, and not behind the end of the instruction. So the gate of
a token never sees a later one, padding or another row, and is the same whether the tokens before it were computed in
the same call or lie in a key-value cache. In encoders, where attention sees everything, all of the sequence is pooled.
Where a row holds several documents, each is pooled for itself.
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
        documents = context.carry.get("documents")  # (B, S), or none where every row is one
        documents = None if documents is None else documents.to(values.device)
        past = self._past(context)
        counted, closed = self._counted(mask, context, past, documents)
        per_row = values.view(*mask.shape, -1).masked_fill(~counted[..., None], 0.0)  # (B, S, C)
        pooled_so_far = _running_sum if self.causal else _whole_sum
        total, count = (pooled_so_far(part, documents) for part in (per_row, counted.long()))
        if past is not None:
            total, count = total + past.total[:, -1:], count + past.count[:, -1:]
        memory = PooledMemory(total.detach(), count, closed)
        memory = memory if past is None else past.followed_by(memory)
        context.carry.setdefault("pooled", {})[self.spec.layer_idx] = memory
        pooled = total / count.clamp(min=1)[..., None] if self.pooling == "mean" else total  # (B, S, C)
        return pooled.flatten(0, 1), (count > 0).flatten()

    def _past(self, context: RoutingContext) -> PooledMemory | None:
        past = context.carry.get("past", {}).get(self.spec.layer_idx)
        remembered, cached = 0 if past is None else len(past), context.carry.get("cached_tokens", 0)
        if remembered != cached:
            raise ValueError(
                f"{type(self).__name__} pools all tokens so far, and the cache of this call holds {cached}, of which "
                f"{cached - remembered} were computed without this adapter: start from an empty cache."
            )
        if context.carry.get("foreign_state") is not None:
            raise ValueError(
                f"{type(self).__name__} pools all tokens so far, and the model keeps earlier ones in a "
                f"{type(context.carry['foreign_state']).__name__} that tells nothing of them: pass use_cache=False."
            )
        if context.carry.get("hides_padding", False):
            raise ValueError(
                f"{type(self).__name__} must know what is padding, and this attention mask does not tell: give a 2-D "
                "one, or leave it to generate."
            )
        return past

    def _counted(
        self,
        mask: torch.Tensor,
        context: RoutingContext,
        past: PooledMemory | None,
        documents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens are pooled, and up to which the instruction has ended, (B, S) bool both."""
        counted = mask
        if self.modalities is not None:
            wanted = torch.tensor(self.modalities, device=mask.device)
            counted = counted & torch.isin(context.modality_ids.to(mask.device), wanted)
        closed = torch.zeros_like(mask) if past is None else past.closed[:, -1:].expand_as(mask)
        if self.end_token_id is not None:
            if context.input_ids is None:
                raise ValueError(
                    f"end_token_id={self.end_token_id} is looked for in the input_ids, which this call did not give."
                )
            ends = (context.input_ids.to(mask.device) == self.end_token_id) & mask
            so_far = _running_sum(ends.long(), documents)
            counted = counted & ~((so_far - ends.long() > 0) | closed)
            closed = closed | (so_far > 0)
        return counted, closed


def _running_sum(values: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of `values` (B, S, ...) up to every token, within its document."""
    total = values.cumsum(1)
    if documents is None:
        return total
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = documents.diff(dim=1, prepend=documents[:, :1]) != 0
    start = place.masked_fill(~starts, 0).cummax(1).values  # (B, S)
    rows = torch.arange(len(documents), device=documents.device)[:, None]
    # What was summed before the first token of the document; nothing comes before the first of all.
    before = (total - values)[rows, start]
    return total - before


def _whole_sum(values: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of `values` (B, S, ...) over the whole document of every token."""
    if documents is None:
        return values.sum(1, keepdim=True).expand_as(values)
    cell = documents.view(*documents.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return torch.zeros_like(values).scatter_add(1, cell, values).gather(1, cell)
