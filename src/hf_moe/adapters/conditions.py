"""The conditions of the rows (task, domain, language, ...), on their way from a call to the routers that read them."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.inputs import check_condition_ids


_CONDITIONS: ContextVar[dict[str, Any] | None] = ContextVar("hf_moe_routing_inputs", default=None)


@contextmanager
def routing_inputs(**conditions: Any) -> Iterator[None]:
    """Give the routers of adapters the conditions of every row, where the call of a model has no place for them.

    `generate` refuses keyword arguments that its model does not name:

        with routing_inputs(task=torch.tensor([0, 1])):
            model.generate(**inputs)

    Args:
        conditions: name -> ids (B,), or features (B, C), of the rows, or one for each of their tokens, (B, S) and
            (B, S, C); beams of a row share them.
    """
    token = _CONDITIONS.set({**(_CONDITIONS.get() or {}), **conditions})
    try:
        yield
    finally:
        _CONDITIONS.reset(token)


class ConditionCollator:
    """Brings the conditions of the rows into the batches of a collator that knows nothing of them, such as TRL's.

    The data keep them in columns `<name>_ids`, which `remove_unused_columns=False` leaves there:

        SFTTrainer(..., data_collator=ConditionCollator(DataCollatorForLanguageModeling(pad_token_id), ["task"]))
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]], names: Sequence[str]):
        self.collator = collator
        self.columns = {name: f"{name}_ids" for name in names}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = {name: torch.tensor([row[column] for row in rows]) for name, column in self.columns.items()}
        others = [{name: row[name] for name in row.keys() - set(self.columns.values())} for row in rows]
        return {**self.collator(others), "condition_ids": ids}


def take_conditions(model: PreTrainedModel, kwargs: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the conditions of a call, and take those out of `kwargs` that the model itself knows nothing of."""
    if not names and "condition_ids" not in kwargs:
        return {}
    given = kwargs.get("condition_ids")
    if given is not None and not isinstance(given, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"condition_ids must name the conditions, {{name: (B,)}}: the model's routers read {sorted(names)}."
            )
        given = kwargs["condition_ids"] = dict.fromkeys(names, given)
    conditions = {**(given or {}), **{name: kwargs[f"{name}_ids"] for name in names if f"{name}_ids" in kwargs}}
    known = inspect.signature(model.forward).parameters
    for name in ("condition_ids", *(f"{name}_ids" for name in conditions)):
        if name not in known:
            kwargs.pop(name, None)
    return conditions


def conditions_of_rows(given: dict[str, Any], read: dict[str, int], rows: int) -> dict[str, torch.Tensor]:
    """Return the conditions of every row, beams included: those `given` with the call, and the ambient ones of
    [`routing_inputs`]; `read` says which ids routers know, see [`conditions_read`]. Ids are (B,), or (B, S) of tokens,
    features (B, C) or (B, S, C).
    """
    ambient = _CONDITIONS.get() or {}
    found = {name: torch.as_tensor(value) for name, value in {**ambient, **given}.items()}
    for name, value in found.items():
        length = len(value) if value.dim() else 0
        # `generate` repeats the rows, and not the ambient conditions.
        fits = length > 0 and (length == rows if name in given else rows % length == 0)
        if not fits or value.dim() > (2 if read.get(name) else 3):
            raise ValueError(
                f"The condition {name!r} needs one value for each of {rows} rows, and has the shape "
                f"{tuple(value.shape)}."
            )
        if read.get(name):
            check_condition_ids(name, value, read[name])
        found[name] = value.repeat_interleave(rows // len(value), dim=0)
    return found
