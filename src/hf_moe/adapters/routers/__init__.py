"""Routers that only adapters can run, one file each; they also take every router of the library."""

from ...configuration.configuration_hf_moe import unknown_name_message
from ...modeling.mechanisms import get_mechanism, mechanism_names
from ...modeling.registry import registered
from ...modeling.routing import Router
from .becotta import BecottaRouter
from .condition import ConditionRouter
from .constant import ConstantRouter
from .host import HostRouter
from .intuition_mor1e import IntuitionRouter
from .modality import ModalityRouter
from .pooled import PooledRouter
from .sequence import SequenceRouter
from .smora import SmoraRouter
from .soft_moa import SoftMoaRouter


__all__ = ["ADAPTER_ROUTERS", "ConditionRouter", "HostRouter", "PooledRouter", "SoftMoaRouter", "router_class"]

ADAPTER_ROUTERS: dict[str, type[Router]] = {
    cls.mechanism_name: cls
    for cls in (
        BecottaRouter,
        ConditionRouter,
        ConstantRouter,
        HostRouter,
        IntuitionRouter,
        ModalityRouter,
        SequenceRouter,
        SmoraRouter,
        SoftMoaRouter,
    )
}


def router_class(name: str) -> type[Router]:
    """Return the class of a router: one of those above, of the library or registered by the user.

    Raises:
        ValueError: if no router has that name, or a registered one has the name of one of those above.
    """
    own = ADAPTER_ROUTERS.get(name)
    others = registered("router")
    if own is None:
        if name not in mechanism_names("router"):
            raise ValueError(unknown_name_message("router", name, [*ADAPTER_ROUTERS, *mechanism_names("router")]))
        return get_mechanism("router", name)
    if name in others:
        raise ValueError(
            f"The router {name!r} is registered by {others[name].__module__}.{others[name].__qualname__}, and LoRA "
            f"experts have a router of that name, {own.__name__}: register yours under another name."
        )
    return own
