"""What routers remember of the tokens in a key-value cache.

A gate that pools the tokens so far needs, when one token is decoded, something of those whose keys and values are
cached. It is one value for every cached token, so that the last ones can be taken back, as assisted generation does.
The values live on the cache, whose class is swapped for a subclass of the same name: what reorders, repeats or crops
the cache does the same to them.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from .subclasses import same_name


# (owner, site) -> the values (B, n, ...) of n tokens. The owner is an adapter, or "" for the model itself.
Remembered = dict[tuple[str, Hashable], torch.Tensor]


class TokenMemory:
    """What the routers of a call know of the tokens before it, and leave for those after it.

    Args:
        cache (`Cache`, *optional*): the cache of the call.
        foreign_state: what the model keeps of earlier tokens in place of a cache, if it does.
        hides_rows (`bool`, *optional*, defaults to `False`): whether the mask does not tell what is padding.
    """

    def __init__(self, cache: Cache | None = None, foreign_state: Any = None, hides_rows: bool = False):
        # Counted before the layers run, since these put their tokens into the cache; read where a router asks.
        length = cached_tokens(cache)
        self._length = length.clone() if isinstance(length, torch.Tensor) else length
        self._remembered = remembered(cache)
        self.kept: Remembered = {}
        self.owner = ""
        self._foreign_state = foreign_state
        self._hides_rows = hides_rows

    @property
    def cached_tokens(self) -> int:
        """n."""
        return int(self._length)

    def of(self, owner: str) -> "TokenMemory":
        """Return the same memory for the routers of an adapter, which have sites of their own."""
        memory = copy.copy(self)
        memory.owner = owner
        return memory

    def knows(self, site: Hashable) -> bool:
        """Whether every cached token is remembered at a site."""
        found = self._found(site)
        return (0 if found is None else found.shape[1]) == self.cached_tokens

    def _found(self, site: Hashable) -> torch.Tensor | None:
        return self._remembered.get((self.owner, site)) if self.cached_tokens else None

    def past(self, site: Hashable) -> torch.Tensor | None:
        """Return what is remembered of the cached tokens, (B, n, ...); `None` where nothing is cached.

        Raises:
            ValueError: if the earlier tokens, or which of these are padding, cannot be known.
        """
        if self._foreign_state is not None:
            raise ValueError(
                "A router reads all tokens so far, and the model keeps earlier ones in a "
                f"{type(self._foreign_state).__name__} that tells nothing of them: pass use_cache=False."
            )
        if self._hides_rows:
            raise ValueError(
                "A router reads all tokens so far and must know what is padding, and this attention mask does not "
                "tell: give a 2-D one, or leave it to generate."
            )
        found = self._found(site)
        if not self.knows(site):
            missing = self.cached_tokens - (0 if found is None else found.shape[1])
            raise ValueError(
                f"A router reads all tokens so far, and the cache of this call holds {self.cached_tokens}, of which "
                f"{missing} were computed without it: start from an empty cache."
            )
        return found

    def remember(self, site: Hashable, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (B, S, ...) after what is remembered, (B, n + S, ...), which the cache keeps, detached."""
        past = self.past(site)
        if past is not None:
            values = torch.cat([past.to(values), values], 1)
        self.kept[self.owner, site] = values.detach()
        return values

    def keep(self, *places: Any) -> None:
        """Leave what the routers remember with the first cache in what a call has returned and was given."""
        cache = next((found for place in places if (found := cache_of(place)) is not None), None)
        if not self.kept or cache is None:
            return
        if "moe_memory" not in vars(cache):
            cache.__class__ = remembering_class(type(cache))
        length = next(iter(self.kept.values())).shape[1]
        # A router that was left out of this call can know the tokens of the cache no more.
        others = {key: values for key, values in remembered(cache).items() if values.shape[1] == length}
        cache.moe_memory = others | self.kept


def cache_of(values: Any) -> Cache | None:
    """Return the cache among the inputs or outputs of a model, which hosts and versions give different names."""
    if not isinstance(values, Mapping | tuple):
        return None
    items = values.values() if isinstance(values, Mapping) else values
    return next((value for value in items if isinstance(value, Cache)), None)


def foreign_state(values: Mapping[str, Any]) -> Any:
    """Return what a model without a `Cache` keeps of earlier tokens, such as xLSTM and RWKV, or `None`."""
    for name, value in values.items():
        own_class = type(value).__name__.endswith("Cache") and not isinstance(value, Cache)
        if own_class or (name == "state" and value is not None):
            return value
    return None


def counts_tokens(cache: Cache) -> bool:
    """Whether a cache knows how many tokens it holds; one of recurrent states alone does not."""
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return True


def cached_tokens(cache: Cache | None) -> int | torch.Tensor:
    """Return how many tokens a cache holds; recurrent states do not count theirs, but the routers' memory does."""
    if cache is None:
        return 0
    if counts_tokens(cache):
        return cache.get_seq_length()
    lengths = [values.shape[1] for values in remembered(cache).values()]
    return max(lengths, default=1) if cache.has_previous_state() else 0


def remembered(cache: Cache | None) -> Remembered:
    """Return what is remembered of the tokens in a cache."""
    return {} if cache is None else vars(cache).get("moe_memory", {})


@same_name
def remembering_class(cache_class: Any) -> dict[str, Any]:
    """Return the subclass of a cache's class that changes the memory with it."""

    def change(self: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.moe_memory = {key: of(values) for key, values in self.moe_memory.items()}

    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        cache_class.reorder_cache(self, beam_idx)
        change(self, lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        cache_class.batch_select_indices(self, indices)
        change(self, lambda values: values[indices.to(values.device)])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        cache_class.batch_repeat_interleave(self, repeats)
        change(self, lambda values: values.repeat_interleave(repeats, dim=0))

    def crop(self: Any, tokens_to_remove: int) -> None:
        cache_class.crop(self, tokens_to_remove)
        change(self, lambda values: values[:, : values.shape[1] - abs(tokens_to_remove)])

    methods = (reorder_cache, batch_select_indices, batch_repeat_interleave, crop)
    return {method.__name__: method for method in methods}
