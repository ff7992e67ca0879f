"""Models that Accelerate has dispatched or offloads: its hooks replace `forward` on each module itself."""

from types import MethodType
from typing import Any

from torch import nn


def swap_class(module: nn.Module, cls: Any) -> None:
    """Give a module another class, whose forward runs also where the old one has been bound to the module itself.

    Raises:
        ValueError: if the module has another forward than that of its class.
    """
    bound = vars(module)
    # Accelerate keeps here what its own forward calls.
    name = next((name for name in ("_old_forward", "forward") if name in bound), None)
    if name is not None:
        if getattr(bound[name], "__func__", None) is not type(module).forward:
            raise ValueError(
                f"A {type(module).__name__} has a forward of its own, {bound[name]!r}, in place of that of its class, "
                "and LoRA experts cannot tell it what they need: adapt the model before its layers are changed."
            )
        bound[name] = MethodType(cls.forward, module)
    module.__class__ = cls
