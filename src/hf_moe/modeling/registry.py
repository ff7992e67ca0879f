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


def _registrar(kind: str) -> Callable[[str], Callable[[type], type]]:
    # A function of this file, by whose module a bundle finds what travels.
    return lambda name: register(kind, name)


# Each takes a name, and returns a decorator: of a `Router`, a kind of `Experts`, a `Block` in the place of a
# feed-forward, what mixes experts within an attention, what changes a whole layer, an `Objective`, a `Connector`.
register_router = _registrar("router")
register_experts = _registrar("experts")
register_block = _registrar("block")
register_attention = _registrar("attention")
register_layer = _registrar("layer")
register_objective = _registrar("objective")
register_connector = _registrar("connector")


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
