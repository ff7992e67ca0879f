"""What routers remember of the tokens in a key-value cache.

A gate that pools the tokens so far needs, when one token is decoded, a summary of those whose keys and values are
cached. A target that reads what is cached of them again, as in multi-head latent attention, needs what its router
decided for them. There is one for every cached token, so that the last ones can be taken back, as assisted generation
does. They live on the cache, whose class is swapped for a subclass of the same name, so that they are reordered,
repeated and cropped with what they belong to.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import Cache


class TokenMemory:
    """What is remembered of every one of n cached tokens, in tensors (B, n, ...) per row."""

    def __len__(self) -> int:
        return next(iter(vars(self).values())).shape[1]

    def rows(self, index: torch.Tensor) -> Self:
        """Return the memory of the rows `index`."""
        return type(self)(*(part.index_select(0, index.to(part.device)) for part in vars(self).values()))

    def first(self, length: int) -> Self:
        """Return the memory of the first `length` tokens."""
        return type(self)(*(part[:, :length] for part in vars(self).values()))

    def followed_by(self, later: Self) -> Self:
        """Return the memory of these tokens and later ones."""
        return type(self)(
            *(torch.cat(parts, 1) for parts in zip(vars(self).values(), vars(later).values(), strict=True))
        )


@dataclass(frozen=True)
class PooledMemory(TokenMemory):
    """What a router had pooled at every one of n cached tokens, per row.

    Attributes:
        total (`torch.Tensor` of shape `(B, n, C)`, float32): sum of what is pooled up to the token.
        count (`torch.Tensor` of shape `(B, n)`): how many tokens that are.
        gate_total, gate_count: the same up to the last end of an instruction, which the gate of the token reads; where
            none has come yet, up to the token.
        closed (`torch.Tensor` of shape `(B, n)`, bool): an instruction has ended.
    """

    total: torch.Tensor
    count: torch.Tensor
    gate_total: torch.Tensor
    gate_count: torch.Tensor
    closed: torch.Tensor


@dataclass(frozen=True)
class DecisionMemory(TokenMemory):
    """What a router had decided for every one of n cached tokens, per row.

    Attributes:
        index (`torch.Tensor` of shape `(B, n, K)`): the experts.
        weight (`torch.Tensor` of shape `(B, n, K)`): theirs.
    """

    index: torch.Tensor
    weight: torch.Tensor


# adapter -> number of the router, or "decision" and that number -> memory
PooledState = dict[str, dict[Hashable, TokenMemory]]


def cache_of(values: Mapping[str, Any] | tuple) -> Cache | None:
    """Return the cache among the inputs or outputs of a model, which hosts and versions give different names."""
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


def cached_tokens(cache: Cache | None) -> int:
    """Return how many tokens a cache holds; recurrent states do not count theirs, but the routers' memory does."""
    if cache is None:
        return 0
    if counts_tokens(cache):
        return int(cache.get_seq_length())
    lengths = [len(memory) for routers in getattr(cache, "moe_lora_state", {}).values() for memory in routers.values()]
    return max(lengths, default=1) if cache.has_previous_state() else 0


def first_column(inputs: Mapping[str, Any], columns: int, length: int) -> int:
    """Return where in a mask of all tokens so far those of the call begin.

    Args:
        inputs: of the root, by name.
        columns: of the mask; behind the tokens there may be free places of a cache of fixed size.
        length: S.

    Raises:
        ValueError: if the mask is shorter than the tokens, or longer where nothing is cached.
    """
    cache, others = cache_of(inputs), columns - length
    if others < 0 or (others > 0 and cache is None and foreign_state(inputs) is None):
        raise ValueError(
            f"The attention_mask has {columns} columns and the call {length} tokens, "
            + ("one column for each is needed." if others < 0 else "but no cache of earlier ones that was found.")
            + " Pass the mask of these tokens, or the cache that holds the others."
        )
    if cache is None or not counts_tokens(cache):
        return others
    return min(cached_tokens(cache), others)


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
    """Return the subclass of a cache's class that changes the routers' memory with it."""

    def change(self: Any, of: Callable[[TokenMemory], TokenMemory]) -> None:
        self.moe_lora_state = {
            adapter: {number: of(memory) for number, memory in routers.items()}
            for adapter, routers in self.moe_lora_state.items()
        }

    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        cache_class.reorder_cache(self, beam_idx)
        change(self, lambda memory: memory.rows(beam_idx))

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        cache_class.batch_select_indices(self, indices)
        change(self, lambda memory: memory.rows(indices))

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        cache_class.batch_repeat_interleave(self, repeats)

        def repeat(memory: TokenMemory) -> TokenMemory:
            rows = torch.arange(len(next(iter(vars(memory).values()))))
            return memory.rows(rows.repeat_interleave(repeats))

        change(self, repeat)

    def crop(self: Any, tokens_to_remove: int) -> None:
        cache_class.crop(self, tokens_to_remove)
        change(self, lambda memory: memory.first(len(memory) - abs(tokens_to_remove)))

    methods = (reorder_cache, batch_select_indices, batch_repeat_interleave, crop)
    body = {method.__name__: method for method in methods}
    return type(cache_class.__name__, (cache_class,), {**body, "__module__": cache_class.__module__})
