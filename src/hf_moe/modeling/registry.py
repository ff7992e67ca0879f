"""Names of mechanisms, and the decorators by which a class takes one.

A mechanism of this library stands in the folder of its kind, in a file with its name. A user's own is registered from
the user's own file:

    from hf_moe import Router, register_router

    @register_router("my_router")
    class MyRouter(Router): ...
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..configuration.checks import checked_options


KINDS = ("router", "experts", "block", "attention", "layer", "objective", "connector", "host")

_REGISTERED: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[type], type]:
    """Return a decorator that registers a class as the mechanism `name` of `kind`.

    Raises:
        ValueError: if another class of another module holds the name already.
    """

    def decorate(cls: type) -> type:
        known = _REGISTERED[kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The {kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}; choose "
                "another name."
            )
        _REGISTERED[kind][name] = cls
        cls.mechanism_name = name  # type: ignore[attr-defined]
        return cls

    return decorate


def register_router(name: str) -> Callable[[type], type]:
    """Register a `Router` under `name`."""
    return register("router", name)


def register_experts(name: str) -> Callable[[type], type]:
    """Register a kind of `Experts` under `name`."""
    return register("experts", name)


def register_block(name: str) -> Callable[[type], type]:
    """Register a `Block`, which takes the place of a feed-forward, under `name`."""
    return register("block", name)


def register_attention(name: str) -> Callable[[type], type]:
    """Register what mixes experts within an attention under `name`."""
    return register("attention", name)


def register_layer(name: str) -> Callable[[type], type]:
    """Register what surrounds or changes a whole layer of a host under `name`."""
    return register("layer", name)


def register_objective(name: str) -> Callable[[type], type]:
    """Register an `Objective` under `name`."""
    return register("objective", name)


def register_connector(name: str) -> Callable[[type], type]:
    """Register a `Connector` under `name`."""
    return register("connector", name)


def registered(kind: str) -> dict[str, type]:
    """Return the mechanisms of `kind` that have been registered so far."""
    return dict(_REGISTERED[kind])


def build(kind: str, cls: type, options: dict[str, Any], *args: Any) -> nn.Module:
    """Build a mechanism from the options of a config, which the annotations of its constructor declare.

    Raises:
        ValueError: if an option is unknown to the class, of another type or out of range, or one it needs is missing.
    """
    name: str = cls.mechanism_name  # type: ignore[attr-defined]
    options = checked_options(kind, name, cls, options, leading=len(args))
    try:
        return cls(*args, **options)
    except TypeError as error:
        raise ValueError(f"The {kind} {name!r} cannot be built: {error}") from error
