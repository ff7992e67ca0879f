"""The cache of an output, whose field every release of Transformers may name as it likes."""

import torch
from transformers.cache_utils import Cache

from helpers.adapted import with_cache


def cache_of(output):
    """Return the one field of a model's output that is a cache."""
    (cache,) = (value for value in output.values() if isinstance(value, Cache))
    return cache


@torch.no_grad()
def decode_one_by_one(model, start: int = 4, **per_token: torch.Tensor):
    """Return the logits of all tokens, given one by one after the first ones, and the cache after them."""
    length = per_token["input_ids"].shape[1]
    output = model(**{name: values[:, :start] for name, values in per_token.items()}, use_cache=True)
    logits = [output.logits]
    for place in range(start, length):
        step = {name: values[:, place : place + 1] for name, values in per_token.items()}
        # Bamba counts from zero where nothing else is said.
        step["position_ids"] = torch.full_like(step["input_ids"], place)
        output = model(**step, **with_cache(model, output), use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, 1), cache_of(output)
