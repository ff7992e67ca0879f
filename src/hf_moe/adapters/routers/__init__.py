"""Routers that only adapters can run yet, one file each; they also take every router of the library."""

from ...configuration.configuration_hf_moe import unknown_name_message
from ...modeling.mechanisms import get_mechanism, mechanism_names
from ...modeling.routing import Router
from ..host_router import HostRouter
from .becotta import BecottaRouter
from .condition import ConditionRouter
from .intuition_mor1e import IntuitionRouter
from .pooled import PooledRouter
from .sequence import SequenceRouter


__all__ = ["ADAPTER_ROUTERS", "ConditionRouter", "HostRouter", "PooledRouter", "router_class"]

ADAPTER_ROUTERS: dict[str, type[Router]] = {
    cls.mechanism_name: cls for cls in (BecottaRouter, ConditionRouter, HostRouter, IntuitionRouter, SequenceRouter)
}


def router_class(name: str) -> type[Router]:
    """Return the class of a router: a registered one, one of this library, or one of those above.

    Raises:
        ValueError: if no router has that name.
    """
    names = mechanism_names("router")
    if name in names:
        return get_mechanism("router", name)
    if name not in ADAPTER_ROUTERS:
        raise ValueError(unknown_name_message("router", name, [*ADAPTER_ROUTERS, *names]))
    return ADAPTER_ROUTERS[name]
