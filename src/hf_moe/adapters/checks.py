"""What the fields of a configuration and the options of a mechanism may hold: their annotations say it."""

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from ..configuration.configuration_hf_moe import unknown_name_message


AT_LEAST_1: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "at least 1")
# Of numbers, alone or in a list: the test, and its words.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": AT_LEAST_1,
    "lora_alpha": (lambda value: value > 0, "greater than 0"),
    "num_experts": AT_LEAST_1,
    "num_experts_per_tok": AT_LEAST_1,
    "shared_r": (lambda value: value >= 0, "at least 0; 0 leaves the plain LoRA out"),
    "lora_dropout": (lambda value: 0.0 <= value < 1.0, "in [0, 1)"),
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation asks for; an int passes for a float, a bool for neither."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, str):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, item) for item in args)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in (list, tuple, set):
        return isinstance(value, origin) and all(fits(item, args[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def check_field(name: str, value: Any, hint: Any, place: str = "", purpose: str = "") -> None:
    """Refuse a value of another type, or out of its range.

    Args:
        name: the field.
        value: what was given.
        hint: its annotation.
        place: what to call the field in an error, unless its name.
        purpose: what it is for, in a sentence.

    Raises:
        ValueError: with the value and what is allowed.
    """
    if not fits(value, hint):
        words = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
        raise ValueError(f"{place or name}={value!r} must be {words}. {purpose}".rstrip())
    allowed, words = RANGES.get(name, (lambda value: True, ""))
    if not all(item is None or allowed(item) for item in (value if isinstance(value, list) else [value])):
        raise ValueError(f"{place or name}={value!r} must be {words}.")


def check_options(kind: str, name: str, cls: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse options that a mechanism does not have, or of another type; its first argument is no option.

    Raises:
        ValueError: with the option, and what is allowed.
    """
    parameters = dict(list(inspect.signature(cls).parameters.items())[1:])
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(unknown_name_message(f"option of the {kind} {name!r}", option, list(parameters)))
        check_field(option, value, parameters[option].annotation, f"{kind} {name!r}: {option}")
