"""Subclasses of a host's classes that keep their names, by which device maps and FSDP wrapping policies find them.

They are made at run time, one for each class of a host, and objects of them can be pickled and copied.
"""

import functools
from collections.abc import Callable
from typing import Any


def same_name(methods: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Turn a function that returns the methods of a subclass into one that returns the subclass.

    Args:
        methods: takes the host's class, and facts about it that can be hashed. It stands at the top of its file.
    """

    @functools.cache
    @functools.wraps(methods)
    def subclass(host_class: Any, *facts: Any) -> Any:
        def __reduce_ex__(self: Any, protocol: int) -> tuple:
            # A class that is made at run time itself, as those of our own models, has no place in a file either.
            if "__reduce_ex__" in vars(host_class):
                create, args, state = host_class.__reduce_ex__(self, protocol)
            else:
                create, args, state = object.__new__, (host_class,), vars(self)
            return _rebuild, (subclass, facts, create, args), state

        body = {"__reduce_ex__": __reduce_ex__, "__module__": host_class.__module__, **methods(host_class, *facts)}
        return type(host_class.__name__, (host_class,), body | {"host_class": host_class, "made_by": subclass})

    return subclass


def _rebuild(subclass: Callable[..., Any], facts: tuple, create: Callable[..., Any], args: tuple) -> Any:
    made = create(*args)
    made.__class__ = subclass(type(made), *facts)
    return made


def is_made_by(obj: Any, subclass: Callable[..., Any]) -> bool:
    """Whether the class of an object is one that this function has returned."""
    return getattr(type(obj), "made_by", None) is subclass
