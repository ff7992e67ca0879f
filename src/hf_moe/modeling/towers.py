"""Towers and connectors with experts: the routing context of their tokens.

The tokens of a tower (patches of images, frames of sounds) are none of the sequence's. Each run of a tower, and of a
connector, opens a context of its own for them, in which a row is an image, and which knows the row of the batch that
the image is in: objectives weigh it as they weigh that row. The context is found by the layers as in a decoder: it is
in the context variable while the tower runs, and an argument of every layer, which survives recomputation.

Media are encoded in the order of their placeholders. Where these are in as many runs as there are images, each run is
one image. Elsewhere an image belongs to the row in which its middle lies when all real patches are laid over the
placeholders in order, which is exact where a placeholder stands for as many patches everywhere. Towers that take all
images as one row of tokens (Qwen2-VL's, Pixtral) get a row for each of the batch.
"""

import inspect
from typing import Any

import torch
from torch.nn import functional as F

from ..configuration.configuration_hf_moe import MODALITIES
from .inputs import real_tokens
from .routing_context import ACTIVE_CONTEXT, CALL_CONTEXT, RoutingContext
from .subclasses import same_name


class TowerContext(RoutingContext):
    """What routers may know of the tokens in one run of a tower or connector.

    Args:
        place (`str`): see [`MoELayerSpec`].
        modality (`int`): of all tokens.
        parent (`RoutingContext`, *optional*): that of the sequence; absent where the tower is called by itself.
        seen (`torch.Tensor` of shape `(B, S)`, *optional*): where the placeholders of what is encoded are; absent
            where that is not known, and every image then counts in every row.
    """

    def __init__(
        self,
        place: str,
        modality: int,
        parent: RoutingContext | None = None,
        seen: torch.Tensor | None = None,
    ):
        nothing = torch.zeros(0, 0, dtype=torch.long)
        super().__init__(nothing, nothing.bool())
        self.place = place
        self.modality = modality
        self.parent = parent
        # The row of the batch that each placeholder lies in, (L,), and each run of them, (R,).
        self.placeholders = None if seen is None else seen.nonzero()[:, 0]
        self.runs = None if seen is None else (seen & ~F.pad(seen, (1, -1))).nonzero()[:, 0]
        # Where the tokens are in rows of one length, if they come as one row: (T,).
        self.position: torch.Tensor | None = None
        if parent is not None:
            self.take_after(parent)

    def lay_out(self, hidden_states: torch.Tensor, mask: Any = None) -> None:
        """Take rows and padding from what reaches the first layer, (N, P, d), (N, H, W, d) or (T, d).

        Args:
            mask: of the attention, see [`real_tokens`]; that of patches goes before it, where the call has one.
        """
        if hidden_states.dim() > 3:
            hidden_states = hidden_states.flatten(1, -2)
        rows = 1 if hidden_states.dim() == 2 else hidden_states.shape[0]
        if rows == 1 and self.placeholders is not None:
            self._lay_out_packed(hidden_states.reshape(-1, hidden_states.shape[-1]))
            return
        hidden_states = hidden_states.view(rows, -1, hidden_states.shape[-1])
        patches = None if self.parent is None else self.parent.inputs.get("pixel_attention_mask")
        if patches is not None and patches.shape == hidden_states.shape[:2]:
            mask = patches
        real = real_tokens(None, {"attention_mask": mask}, hidden_states)
        self.token_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if real is None else real
        self.modality_ids = torch.full_like(self.token_mask, self.modality, dtype=torch.long)
        if self.placeholders is not None and self.runs is not None:
            one_each = len(self.runs) == rows
            self.row_index = self.runs if one_each else self._rows_of(self.token_mask.sum(-1))  # (N,)
            self._take_conditions(self.row_index)

    def _lay_out_packed(self, tokens: torch.Tensor) -> None:
        assert self.parent is not None
        row = self._rows_of(torch.ones(len(tokens), dtype=torch.long, device=tokens.device))  # (T,), ascending
        counts = row.bincount(minlength=len(self.parent.token_mask))  # (B,)
        place = torch.arange(int(counts.max()), device=tokens.device)
        self.token_mask = place < counts[:, None]  # (B, longest)
        self.position = self.token_mask.flatten().nonzero().squeeze(-1)
        self.modality_ids = torch.full_like(self.token_mask, self.modality, dtype=torch.long)
        self._take_conditions(torch.arange(len(counts), device=tokens.device))

    def _rows_of(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the row of the batch that the middle of each of several runs of `counts` (N,) real tokens lies in."""
        assert self.placeholders is not None
        placeholders = self.placeholders.to(counts.device)
        middle = 2 * counts.cumsum(0) - counts  # in half tokens, so that all stays whole
        index = middle * len(placeholders) // (2 * counts.sum()).clamp(min=1)
        return placeholders[index.clamp(max=len(placeholders) - 1)]

    def _take_conditions(self, row: torch.Tensor) -> None:
        assert self.parent is not None
        given = self.parent.condition_ids.items()
        self.condition_ids = {name: ids[row.to(ids.device)] for name, ids in given if ids.dim() == 1}

    def in_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.position is None:
            return hidden_states.view(*self.token_mask.shape, -1)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = tokens.new_zeros(self.token_mask.numel(), tokens.shape[-1])
        return rows.index_copy(0, self.position, tokens).view(*self.token_mask.shape, -1)

    def out_of_rows(self, output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self.position is not None:
            output = output.flatten(0, 1).index_select(0, self.position)
        return output.reshape(*like.shape[:-1], -1)

    def to_batch(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        if self.placeholders is None:
            return values.mean().expand(rows)
        return super().to_batch(values, rows)


def context_of_run(place: str, modalities: tuple[str, ...]) -> TowerContext:
    """Return the context of a run at a place, which encodes those of the modalities that the call has, in order."""
    numbers = [MODALITIES.index(name) for name in modalities]
    parent = CALL_CONTEXT.get()
    if parent is None:
        return TowerContext(place, numbers[0])
    known = parent.modality_ids if parent.placeholders is None else parent.placeholders
    present = [item for item in numbers if bool((known == item).any())]
    if not present:  # as of a black image, encoded so that every process has the same gradients
        return TowerContext(place, numbers[0])
    run = sum(isinstance(part, TowerContext) and part.place == place for part in parent.parts.values())
    if run < len(present):
        context = TowerContext(place, present[run], parent, known == present[run])
    else:  # a run for each image
        context = TowerContext(place, present[-1], parent)
    parent.parts[f"{place}.{run}"] = context
    return context


@same_name
def placed_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a tower's or connector's class whose calls run in a context of their own."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = ACTIVE_CONTEXT.get()
        ACTIVE_CONTEXT.set(context_of_run(*self.routing_place))
        try:
            return host_class.__call__(self, *args, **kwargs)
        finally:  # hooks do not hear of a KeyboardInterrupt
            ACTIVE_CONTEXT.restore(before)

    return {"__call__": __call__}


def carry_place_context(part: Any, first: Any, place: str, modalities: tuple[str, ...]) -> None:
    """Let a tower or connector run in contexts of its own.

    Args:
        first: the first of its layers, where its tokens are laid out; the part itself where it is a layer.
        place, modalities: see [`context_of_run`].
    """
    part.routing_place = (place, modalities)
    first.layer_arguments = list(inspect.signature(first.forward).parameters)
    part.__class__ = placed_class(type(part))
    first.register_forward_pre_hook(_lay_out, with_kwargs=True)


def _lay_out(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    # A layer that is recomputed finds the context of its own run among its arguments.
    context = kwargs.get("routing_context", ACTIVE_CONTEXT.get())
    if isinstance(context, TowerContext):
        given = {**dict(zip(layer.layer_arguments, args, strict=False)), **kwargs}
        context.lay_out(next(iter(given.values())), given.get("attention_mask"))
