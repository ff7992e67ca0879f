"""Values that differ between layers: `{"default": 8, "3": 16}` in place of 8."""

import re
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import validated_field

from .checks import Interval


LAYER_KEY = re.compile(r"default|last_[1-9][0-9]*|0|[1-9][0-9]*")


def is_layer_map(value: Any) -> bool:
    """Whether a value is a map from layer to value: all keys are layer indices, `"last_N"` or `"default"`."""
    return isinstance(value, dict) and bool(value) and all(LAYER_KEY.fullmatch(str(key)) for key in value)


def at_layer(value: Any, layer_idx: int | str) -> Any:
    """Resolve `value` for one layer.

    Every option may be a map from layer to value: `{"default": 8, "3": 16}`, or `{"default": 8, "last_2": 16}` for the
    two layers at the top, see [`spell_out`]. A mapping counts as such a map when each of its keys is a layer index,
    `"last_N"` or `"default"`; maps are resolved at any depth of an option.

    Raises:
        ValueError: if the map has no entry for the layer and no default.
    """
    if is_layer_map(value):
        by_name = {str(key): item for key, item in value.items()}
        if str(layer_idx) not in by_name and "default" not in by_name:
            raise ValueError(
                f"The map {value} has no value for layer {layer_idx}: add the key '{layer_idx}' or 'default'."
            )
        return at_layer(by_name.get(str(layer_idx), by_name.get("default")), layer_idx)
    if isinstance(value, dict):
        return {key: at_layer(item, layer_idx) for key, item in value.items()}
    return value


def spell_out(value: Any, num_layers: int) -> Any:
    """Return a value in whose layer maps the layers of `"last_N"` have keys of their own, in a part of `num_layers`.

    An index goes before `"last_N"`, and a smaller N before a larger one.
    """
    if not isinstance(value, dict):
        return value
    value = {key: spell_out(item, num_layers) for key, item in value.items()}
    if not is_layer_map(value):
        return value
    lasts = {int(key[5:]): item for key, item in value.items() if str(key).startswith("last_")}
    found = {key: item for key, item in value.items() if not str(key).startswith("last_")}
    named = {str(key) for key in found}
    for number in sorted(lasts, reverse=True):
        last = {str(index) for index in range(num_layers)[-number:]}
        found |= dict.fromkeys(sorted(last - named, key=int), lasts[number])
    return found


def layer_values(value: Any) -> list[Any]:
    """Return the values of a layer map, or the value itself as the only one."""
    return list(value.values()) if is_layer_map(value) else [value]


def map_layers(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value after `change`, or a layer map of the changed values."""
    if not is_layer_map(value):
        return change(value)
    return {key: item if item is None else change(item) for key, item in value.items()}


def layers_named(value: Any) -> set[str]:
    """Return the keys of all layer maps in a value, at any depth."""
    if not isinstance(value, dict):
        return set()
    own = {str(key) for key in value} if is_layer_map(value) else set()
    return own.union(*(layers_named(item) for item in value.values()))


def per_layer(allowed: Interval | None = None, default: Any = None) -> Any:
    """Return the field of a config that holds a value or a layer map of values, each within the `allowed` range."""

    def check(value: Any) -> None:
        if isinstance(value, dict) and not is_layer_map(value):
            raise ValueError(
                f"{value} must be one value, or a map from layer to value, whose keys are layer indices, 'last_N' or "
                "'default'."
            )
        for item in layer_values(value):
            if item is not None and allowed is not None and item not in allowed:
                raise ValueError(f"{item} must {allowed}" + (f", in {value}." if item is not value else "."))

    return validated_field(check, default=default)
