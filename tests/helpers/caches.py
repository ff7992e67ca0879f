"""The cache of an output, whose field every release of Transformers may name as it likes."""

from transformers.cache_utils import Cache


def cache_of(output):
    """Return the one field of a model's output that is a cache."""
    (cache,) = (value for value in output.values() if isinstance(value, Cache))
    return cache
