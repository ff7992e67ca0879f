"""The base of routers that look at a whole sequence, or at its instruction, without looking ahead.

    pooled_t = mean, or sum, of v_s over the counted tokens s <= t
    with `end_token_id`, after the first such token: over s <= e, the last of them up to t

A token counts if it is real and of one of the named modalities. So the gate of a token never sees a later one, padding
or another row, and it is the same whether the tokens before were computed in the same call or lie in a cache. In
encoders, where attention sees everything, all of the sequence is pooled, or all up to the last end. Where a row holds
several documents, each is pooled for itself.
"""

import warnings
from dataclasses import dataclass

import torch

from ..configuration.checks import NonNegativeInt
from ..configuration.configuration_hf_moe import MODALITIES
from .decisions import Decision
from .gating import check_choice
from .layer_spec import MoELayerSpec
from .routing import Router
from .routing_context import RoutingContext, is_one_of


# After so many rows whose instructions are all the same, their end is not where it was thought to be.
SAME_ROWS = 8


@dataclass(frozen=True)
class Spans:
    """What is pooled of the cached tokens and those of a call, (B, n + S) bool or int64 each.

    Attributes:
        counted: the tokens that are pooled.
        ends: those at which an instruction ends.
        documents: which of several in its row a token belongs to; `None` where every row is one.
        causal: whether a token sees those up to itself alone.
    """

    counted: torch.Tensor
    ends: torch.Tensor
    documents: torch.Tensor | None
    causal: bool

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` (B, n + S, ...) over the pooled tokens that a token sees."""
        counted = self.counted.view(*self.counted.shape, *[1] * (values.dim() - 2))
        summed = _running_sum if self.causal else _whole_sum
        return summed(values.masked_fill(~counted, 0), self.documents)

    @property
    def ended(self) -> torch.Tensor:
        """Whether an instruction has ended up to a token, (B, n + S) bool."""
        return _running_sum(self.ends.long(), self.documents) > 0

    def at_end(self, total: torch.Tensor) -> torch.Tensor:
        """Return what `total` (B, n + S, ...) was at the last end up to every token; as it is where none has come."""
        place = torch.arange(total.shape[1], device=total.device).expand(self.ends.shape)
        last = place.masked_fill(~self.ends, 0).cummax(1).values  # (B, n + S)
        ones = [1] * (total.dim() - 2)
        found = torch.take_along_dim(total, last.view(*last.shape, *ones), 1)
        return torch.where(self.ended.view(*last.shape, *ones), found, total)


class PooledRouter(Router):
    """Base of the sequence-level routers.

    Args:
        modalities: which tokens are pooled, by modality; all when `None`.
        end_token_id: the token that ends a turn, such as `<|im_end|>`, or the first one of the answer's header: it is
            the last one to be pooled, and the gate is constant until the next one. `None` pools everything.
        end: `"last"`: the instruction is all up to the last end before a token, so that the gate of an answer has read
            the system's turn and the user's. `"first"`: the first end ends it for good, as where a system's turn is
            the instruction.
        pooling: `"mean"` or `"sum"`.

    Raises:
        ValueError: if a modality, the end or the pooling is unknown.
    """

    reads = frozenset({"hidden_states", "sequence"})

    def __init__(
        self,
        spec: MoELayerSpec,
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: NonNegativeInt | None = None,
        end: str = "last",
        pooling: str = "mean",
    ):
        super().__init__(spec)
        check_choice("pooling", pooling, ("mean", "sum"))
        check_choice("end", end, ("last", "first"))
        self.pooling = pooling
        if modalities is not None and not modalities:
            raise ValueError("modalities=[] pools nothing: leave it out to pool the tokens of all modalities.")
        for name in modalities or ():
            check_choice("modalities", name, MODALITIES)
        self.modalities = None if modalities is None else [MODALITIES.index(name) for name in modalities]
        self.end_token_id = end_token_id
        self.end = end
        # How many rows had the instruction of the first, the sum of whose tokens is kept; none are asked any more.
        self._same_rows: int | None = None if end_token_id is None else 0
        self._first_row: torch.Tensor | None = None

    def pool(self, values: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `values` (T, C) float32 pooled, (T, C), and whether any token was counted, (T,) bool."""
        rows, length = context.token_mask.shape
        spans = self.spans(context, values.device)
        flags = torch.stack([spans.counted, spans.ends], -1)[:, -length:].to(values.dtype)  # (B, S, 2)
        # Remembered token by token, the values are summed in the same order whether or not they come from a cache.
        held = context.remember(self.spec.site, torch.cat([values.view(rows, length, -1), flags], -1))
        total = spans.sum(held[..., :-2])  # (B, n + S, C)
        count = spans.sum(spans.counted.long())  # (B, n + S)
        if self.end_token_id is not None and self.spec.causal:
            total, count = spans.at_end(total), spans.at_end(count)
        total, count = total[:, -length:], count[:, -length:]
        pooled = total / count.clamp(min=1)[..., None] if self.pooling == "mean" else total  # (B, S, C)
        return pooled.flatten(0, 1), (count > 0).flatten()

    def spans(self, context: RoutingContext, device: torch.device) -> Spans:
        """Return what is pooled of the cached tokens and those of a call."""
        counted = mask = context.token_mask.to(device)  # (B, S)
        documents = context.documents  # (B, S), or none where every row is one
        documents = None if documents is None else documents.to(device)
        past = context.past(self.spec.site)  # (B, n, C + 2)
        if self.modalities is not None:
            counted = counted & is_one_of(context.modality_ids.to(device), self.modalities)
        ends = torch.zeros_like(mask)
        if self.end_token_id is not None:
            ends = instruction_ends(context, self.end_token_id, device)
        if past is not None:
            flags = past[..., -2:].to(device).bool()
            counted, ends = torch.cat([flags[..., 0], counted], 1), torch.cat([flags[..., 1], ends], 1)
        if self.end_token_id is not None:
            if self.end == "first":
                ends = ends & (_running_sum(ends.long(), documents) == 1)
            if not self.spec.causal:  # every token sees the same: all up to the last end
                number, whole = (part(ends.long(), documents) for part in (_running_sum, _whole_sum))
                counted = counted & ((whole == 0) | (whole - number + ends.long() > 0))
        return Spans(counted, ends, documents, self.spec.causal)

    def answers(self, spans: Spans, context: RoutingContext) -> torch.Tensor:
        """Return which tokens' gates have read the whole instruction of their sample, (B, S) bool.

        They are those with labels after the end of an instruction, or all after it where the call has no labels. The
        token that ends the answer has read that too.
        """
        labelled = context.labelled
        after = spans.ended & ~spans.ends
        return after if labelled is None else after & labelled.to(after.device)

    def leave_samples(self, values: torch.Tensor, context: RoutingContext) -> None:
        """Leave the pooled `values` (T, C) of every sample for the end of a training forward.

        A sample is a row: the mean over the tokens of its answer, whose gates have read its instruction, or its last
        token where there is no end.
        """
        # Not where a sample goes on behind what is cached, as in the generation of a model in training mode.
        if not self.training or context.memory.cached_tokens:
            return
        pooled, known = (part.view(*context.token_mask.shape, -1) for part in self.pool(values.detach(), context))
        known = known.squeeze(-1)  # (B, S)
        read = torch.zeros_like(known)
        read[:, -1] = True
        if self.end_token_id is not None:
            answers = self.answers(self.spans(context, known.device), context)
            read = torch.where(answers.any(1, keepdim=True), answers, read)
        read = read & known
        number = read.sum(1, keepdim=True)  # (B, 1)
        samples = pooled.masked_fill(~read[..., None], 0.0).sum(1) / number.clamp(min=1)  # (B, C)
        context.carry.setdefault("pooled_samples", {})[self.spec.site] = (samples, number[:, 0] > 0)

    def left_samples(self, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the samples (B, C) that a forward has left, and which rows have one, (B,) bool."""
        return context.carry.get("pooled_samples", {}).get(self.spec.site)

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        """Warn if the instructions of all rows of a training are the same, so that the gate tells no rows apart."""
        if self._same_rows is None or context.input_ids is None or context.memory.cached_tokens:
            return
        ids = context.input_ids
        spans = self.spans(context, ids.device)
        # A number for every instruction: the sum of its tokens, each made a large number of its own.
        signature = spans.sum((ids.long() + 1) * 2654435761 % 2305843009)
        signature = spans.at_end(signature) if self.spec.causal else signature
        answers = self.answers(spans, context)
        rows = answers.any(1)
        last = torch.arange(ids.shape[1], device=ids.device).masked_fill(~answers, 0).amax(1, keepdim=True)
        found = signature.gather(1, last)[rows].squeeze(1)
        if not len(found):
            return
        self._first_row = found[0] if self._first_row is None else self._first_row
        self._same_rows += len(found)
        if bool((found != self._first_row.to(found.device)).any()):
            self._same_rows = None
        elif self._same_rows >= SAME_ROWS:
            warnings.warn(
                f"{type(self).__name__} gives all rows the same gates: up to end_token_id={self.end_token_id} with "
                f"end={self.end!r}, the instructions of {self._same_rows} rows are equal. A system turn that a chat "
                "template adds may end first: name the token that ends the user's turn, and set end='last'.",
                stacklevel=2,
            )
            self._same_rows = None


def instruction_ends(context: RoutingContext, end_token_id: int, device: torch.device) -> torch.Tensor:
    """Return the real tokens that end an instruction, (B, S) bool.

    Raises:
        ValueError: if the call has no `input_ids`.
    """
    if context.input_ids is None:
        raise ValueError(f"end_token_id={end_token_id} is looked for in the input_ids, which this call did not give.")
    return (context.input_ids.to(device) == end_token_id) & context.token_mask.to(device)


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
