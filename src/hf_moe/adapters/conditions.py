"""The conditions of the rows (task, domain, language, ...), on their way from a call to the routers that read them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.routing import Router


_CONDITIONS: ContextVar[dict[str, Any] | None] = ContextVar("hf_moe_routing_inputs", default=None)


@contextmanager
def routing_inputs(**conditions: Any) -> Iterator[None]:
    """Give the routers of adapters the conditions of every row, where the call of a model has no place for them.

    `generate` refuses keyword arguments that its model does not name:

        with routing_inputs(task=torch.tensor([0, 1])):
            model.generate(**inputs)

    Args:
        conditions: name -> ids (B,), or features (B, C), of the rows; beams of a row share them.
    """
    token = _CONDITIONS.set({**(_CONDITIONS.get() or {}), **conditions})
    try:
        yield
    finally:
        _CONDITIONS.reset(token)


def take_conditions(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the conditions of the rows, and take those out of `kwargs` that the model itself knows nothing of."""
    conditions = {**(_CONDITIONS.get() or {}), **(kwargs.get("condition_ids") or {})}
    for module in model.modules():
        name = getattr(module, "condition", None) if isinstance(module, Router) else None
        if name is not None and f"{name}_ids" in kwargs:
            conditions[name] = kwargs[f"{name}_ids"]
    known = inspect.signature(model.forward).parameters
    for name in ("condition_ids", *(f"{name}_ids" for name in conditions)):
        if name not in known:
            kwargs.pop(name, None)
    return {name: torch.as_tensor(value) for name, value in conditions.items()}
