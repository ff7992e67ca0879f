"""A layer of a host that runs on some of its tokens: they are gathered, and the others cost nothing.

Chosen tokens attend to chosen ones alone, with the positions that they have in the whole sequence. The layer's keys
and values go to their own places in the cache, so that it counts as many tokens as those of all other layers, and what
crops, reorders or slides over a cache does the same to it. The places between hold what no query may see: the mask of
a call with cached tokens hides them. A cache of the chosen tokens alone would be smaller, but rows differ in their
number, while the first layer of a cache tells all of them how long it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .routing_context import RoutingContext


# Arguments of a layer with values for every token, and the number of dimensions that follow that of the tokens.
PER_TOKEN = {"position_ids": 0, "position_embeddings": 1, "moe_mm_token_type_ids": 0, "per_layer_input": 1}


class GatheredTokens:
    """Some tokens of every row, in their order.

    Args:
        chosen (`torch.Tensor` of shape `(B, S)`, bool): which tokens.
        most (`int`): C, at least as many as a row has. Rows with fewer are filled up with tokens that are not chosen.
    """

    def __init__(self, chosen: torch.Tensor, most: int):
        self.shape = chosen.shape
        self.index = (~chosen).byte().argsort(dim=1, stable=True)[:, :most]  # (B, C)
        self.real = chosen.gather(1, self.index)  # (B, C)

    def take(self, values: torch.Tensor, trailing: int = 0) -> torch.Tensor:
        """Return the tokens' part of values (..., B or 1, S, ...), with `trailing` dimensions after that of S."""
        dim = values.dim() - 1 - trailing
        rows = [*values.shape[: dim - 1], len(self.index), *values.shape[dim:]]
        index = self.index.to(values.device).view(*self.index.shape, *[1] * trailing)
        shape = [*rows[:dim], self.index.shape[1], *rows[dim + 1 :]]
        return values.expand(rows).gather(dim, index.expand(shape))

    def put(self, values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Return `into` (B, S, d) with values (B, C, d) in the places of the chosen tokens; all else is as it was."""
        values = torch.where(self.real[..., None], values, self.take(into, 1))
        return into.scatter(1, self.index[..., None].expand_as(values), values)

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """Return keys or values (B, H, C, D) at their places among all tokens, (B, H, S, D)."""
        whole = states.new_zeros(*states.shape[:2], self.shape[1], states.shape[-1])
        return whole.scatter(2, self.index[:, None, :, None].expand_as(states), states)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a layer is given for all tokens, for these alone; its mask and its cache stay as they are.

        Raises:
            ValueError: if a tensor of these is not known to belong to the tokens.
        """
        found = dict(given)
        for name, value in given.items():
            if name in PER_TOKEN and isinstance(value, torch.Tensor | tuple):
                parts = [self.take(item, PER_TOKEN[name]) for item in (value if isinstance(value, tuple) else [value])]
                found[name] = tuple(parts) if isinstance(value, tuple) else parts[0]
            elif isinstance(value, torch.Tensor) and value.dim() and name != "attention_mask":
                raise ValueError(
                    f"A layer that runs on some of its tokens is given {name} of shape {tuple(value.shape)}, and it "
                    "is not known which of these are of which token: choose another host, or leave these layers out."
                )
        return found

    def own_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Return a mask (B or 1, H, S, L >= S) of all tokens for these, (B, H, C, C); `None`, causal, stays."""
        if mask is None:
            return None  # in their order, with fillers last
        rows = self.take(mask.transpose(0, 1), 1)  # (H, B, C, L)
        both = self.take(rows.transpose(2, 3), 1).transpose(2, 3)  # (H, B, C, C)
        return self._limited(both.transpose(0, 1), self.real)

    def mask_of_cached(self, mask: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
        """Return a mask (B or 1, H, S, L) of all tokens for the queries of these, and for keys that are `seen` (B, L).

        `None`, which is a single token's, stands for all keys.
        """
        if mask is None:
            mask = torch.ones(1, 1, self.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device)
        return self._limited(self.take(mask.transpose(0, 1), 1).transpose(0, 1), seen)

    def _limited(self, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        # A filler sees everything: a query without any key is not a number.
        allowed = seen[:, None, None, :] | ~self.real[:, None, :, None]
        if mask.dtype == torch.bool:
            return (mask & allowed) | ~self.real[:, None, :, None]
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


class GatheredCache(Cache):
    """The cache of a call, as a layer sees it that runs on some of the tokens.

    Args:
        cache (`Cache`): of the call.
        tokens (`GatheredTokens`): those that the layer runs on.
        is_first (`bool`): whether nothing is cached; tokens then attend to each other's states as they are.
    """

    def __init__(self, cache: Cache, tokens: GatheredTokens, is_first: bool):
        self.__dict__.update(vars(cache))
        self.whole = cache
        self.tokens = tokens
        self.is_first = is_first
        # What the layer's keys and values look like, without a token in them, for `count_skipped`.
        self.states: tuple[torch.Tensor, ...] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = (key_states, value_states)
        self.states = tuple(item[:0].detach() for item in own)
        found = self.whole.update(*map(self.tokens.spread, own), layer_idx, *args, **kwargs)
        return own if self.is_first else found


def count_skipped(cache: Cache, layer_idx: int, states: tuple[torch.Tensor, ...], rows: int, length: int) -> None:
    """Count `length` tokens in the cache of a layer that runs on none of them; `states` are of a [`GatheredCache`]."""
    cache.update(*(item.new_zeros(rows, item.shape[1], length, item.shape[3]) for item in states), layer_idx)


def seen_keys(seen: torch.Tensor, cache: Cache, layer_idx: int, length: int) -> torch.Tensor:
    """Return which of the keys that a layer's cache will return hold a chosen token, (B, L).

    Args:
        seen (`torch.Tensor` of shape `(B, n + S)`, bool): which tokens were chosen, from the first one.
        length (`int`): S.
    """
    keys, start = cache.get_mask_sizes(length, layer_idx)
    found = seen[:, start : start + keys]
    return F.pad(found, (0, keys - found.shape[1]))  # a static cache has room for tokens that are yet to come


class GatheredContext(RoutingContext):
    """What routers may know of the gathered tokens; their decisions are a part of those of the whole call."""

    def __init__(self, whole: RoutingContext, tokens: GatheredTokens):
        super().__init__(
            modality_ids=lambda: tokens.take(whole.modality_ids),
            token_mask=tokens.real.to(whole.token_mask.device),
            input_ids=None if whole.input_ids is None else tokens.take(whole.input_ids),
        )
        self.take_after(whole)
        self.memory = whole.memory
        self.documents = None if whole.documents is None else tokens.take(whole.documents)
        if whole.labelled is not None:
            self.inputs = {"labels": tokens.take(whole.inputs["labels"])}
        self.condition_ids = whole.condition_ids
        if whole.condition_ids:
            self.condition_ids = {
                name: _of_gathered(whole, name, values, tokens) for name, values in whole.condition_ids.items()
            }

    def past(self, site: Any) -> torch.Tensor | None:
        if self.memory.cached_tokens:
            raise ValueError(
                f"The router of layer {site} reads all tokens so far, and its layer runs on some of them, others in "
                "every row: pass use_cache=False, or choose a router that reads a token by itself."
            )
        return None

    def remember(self, site: Any, values: torch.Tensor) -> torch.Tensor:
        self.past(site)
        return values


def _of_gathered(whole: RoutingContext, name: str, values: torch.Tensor, tokens: GatheredTokens) -> torch.Tensor:
    # Ids of rows (B,) and features of rows (B, C) hold for all tokens of a row.
    if values.dim() - values.is_floating_point() == 1:
        return values
    return tokens.take(whole.of_tokens(name, values), values.dim() - 2)
