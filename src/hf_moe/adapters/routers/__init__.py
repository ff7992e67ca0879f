"""Routers that only adapters can run, one file each; they also take every router of the library."""

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


__all__ = ["ADAPTER_ROUTERS", "ConditionRouter", "HostRouter", "PooledRouter", "SoftMoaRouter"]

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
