"""What pooled routers remember of the tokens in a key-value cache.

A gate that pools the tokens so far needs, when one token is decoded, a summary of those whose keys and values are
cached. The summary lives on the cache, whose class is swapped for a subclass of the same name, so that it is reordered
and repeated with the rows it belongs to.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache


@dataclass(frozen=True)
class PooledMemory:
    """The tokens that a router has pooled so far, per row.

    Attributes:
        total (`torch.Tensor` of shape `(B, C)`, float32): sum of what is pooled.
        count (`torch.Tensor` of shape `(B,)`): how many tokens that were.
        closed (`torch.Tensor` of shape `(B,)`, bool): the instruction has ended, nothing is pooled any more.
    """

    total: torch.Tensor
    count: torch.Tensor
    closed: torch.Tensor

    def rows(self, index: torch.Tensor) -> "PooledMemory":
        """Return the memory of the rows `index`."""
        return PooledMemory(*(part.index_select(0, index.to(part.device)) for part in vars(self).values()))


# adapter -> number of the router -> memory
PooledState = dict[str, dict[int, PooledMemory]]


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """Return the cache among the inputs or outputs of a model; that of recurrent states has a name of its own."""
    caches = (values.get(name) for name in ("past_key_values", "cache_params"))
    return next((cache for cache in caches if isinstance(cache, Cache)), None)


def cached_tokens(cache: Cache | None) -> int:
    """Return how many tokens a cache holds; recurrent states do not count theirs, and give 1 if there are any."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())


def past_state(cache: Cache | None) -> PooledState:
    """Return what is remembered of the tokens in a cache; nothing for an empty one."""
    return getattr(cache, "moe_lora_state", {}) if cached_tokens(cache) else {}


def keep_state(cache: Cache | None, state: PooledState) -> None:
    """Leave what is remembered with the cache."""
    if state and cache is not None:
        if not hasattr(cache, "moe_lora_state"):
            cache.__class__ = remembering_class(type(cache))  # type: ignore[arg-type]
        cache.moe_lora_state = state


@functools.cache
def remembering_class(cache_class: Any) -> Any:
    """Return the subclass of a cache's class that moves the routers' memory with its rows."""

    def move(self: Any, index: torch.Tensor) -> None:
        self.moe_lora_state = {
            adapter: {number: memory.rows(index) for number, memory in routers.items()}
            for adapter, routers in self.moe_lora_state.items()
        }

    def rows(self: Any) -> torch.Tensor:
        memory = next(memory for routers in self.moe_lora_state.values() for memory in routers.values())
        return torch.arange(len(memory.count), device=memory.count.device)

    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        cache_class.reorder_cache(self, beam_idx)
        move(self, beam_idx)

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        cache_class.batch_select_indices(self, indices)
        move(self, indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        cache_class.batch_repeat_interleave(self, repeats)
        move(self, rows(self).repeat_interleave(repeats))

    def crop(self: Any, tokens_to_remove: int) -> None:
        closed = all(memory.closed.all() for routers in self.moe_lora_state.values() for memory in routers.values())
        if tokens_to_remove > 0 and not closed:
            raise ValueError(
                "A router pools the tokens so far, and cannot forget those that are cropped from the cache: give it "
                "an end_token_id, after which it pools no more, or generate without an assistant model."
            )
        cache_class.crop(self, tokens_to_remove)

    methods = (reorder_cache, batch_select_indices, batch_repeat_interleave, crop)
    body = {method.__name__: method for method in methods}
    return type(cache_class.__name__, (cache_class,), {**body, "__module__": cache_class.__module__})
