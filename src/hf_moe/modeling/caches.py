"""How a cache reaches the decoder: by its type, under the name that the decoder has for it.

Transformers has renamed the argument (`past_key_values`, `cache`), and a decoder accepts a name that it does not know
among its further keywords: it would decode without a cache, and only its logits would tell.
"""

import inspect
from typing import Any, get_args

from transformers.cache_utils import Cache


def cache_argument(model_class: type) -> str | None:
    """Return the name under which the forward of a decoder takes its cache; `None` if it takes none."""
    for parameter in inspect.signature(model_class.forward).parameters.values():  # type: ignore[attr-defined]
        types = (parameter.annotation, *get_args(parameter.annotation))
        if any(isinstance(item, type) and issubclass(item, Cache) for item in types):
            return parameter.name
    return None


def name_cache(name: str | None, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments of a call as keywords for the decoder, with the cache under `name`.

    Args:
        name: what the decoder calls its cache, see [`cache_argument`].
        args: what was given by position after `position_ids`: the cache, or nothing.
        kwargs: the further keywords; a cache may have any name.
    """
    if any(value is not None and not isinstance(value, Cache) for value in args):
        raise TypeError(
            "After position_ids only the cache may be given by position, and got "
            f"{[type(value).__name__ for value in args]}: give the rest by name."
        )
    named = [key for key, value in kwargs.items() if isinstance(value, Cache)]
    caches = [value for value in args if value is not None] + [kwargs[key] for key in named]
    if not caches:
        return kwargs
    if len(caches) > 1 or name is None:
        raise ValueError(
            f"{len(caches)} caches were given ({', '.join(named) or 'by position'}), and the decoder takes "
            f"{'one' if name else 'none'}."
        )
    return {key: value for key, value in kwargs.items() if key not in named} | {name: caches[0]}
