"""What a field or an option may hold: its annotation says the type, and the range beside it.

    capacity_factor: Positive | None = None
    score_function: Literal["softmax", "sigmoid"] = "softmax"

One checker reads these annotations wherever a user sets a value: fields of configs, options of mechanisms. Numbers are
finite everywhere. YAML reads `1e-3` as a string: a string that spells a number is taken for it where, and only where,
a number is declared and no string.
"""

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from huggingface_hub import dataclasses as hub
from huggingface_hub.errors import StrictDataclassFieldValidationError


@dataclass(frozen=True)
class Interval:
    """The range of a number: `Annotated[float, Interval(0, 1)]`.

    Args:
        minimum, maximum: the ends.
        open_minimum, open_maximum: leave the end itself out.
    """

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False
    open_maximum: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.minimum < value if self.open_minimum else self.minimum <= value
        below = value < self.maximum if self.open_maximum else value <= self.maximum
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.maximum == math.inf:
            return f"be {'greater than' if self.open_minimum else 'at least'} {self.minimum:g}"
        left, right = "(" if self.open_minimum else "[", ")" if self.open_maximum else "]"
        return f"lie in {left}{self.minimum:g}, {self.maximum:g}{right}"


PositiveInt = Annotated[int, Interval(1)]
NonNegativeInt = Annotated[int, Interval(0)]
Positive = Annotated[float, Interval(0, open_minimum=True)]
NonNegative = Annotated[float, Interval(0)]
Share = Annotated[float, Interval(0, 1)]


def unknown_name_message(kind: str, name: str, known: list[str]) -> str:
    """Return the text of an error about an unknown name, with the nearest valid ones."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(item) for item in near)}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known)) or 'none'}."


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation asks for; an int passes for a float, a bool for neither."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, str):
        return True
    if origin is Annotated:
        return fits(value, args[0]) and all(value in item for item in args[1:] if isinstance(item, Interval))
    if origin in (Union, UnionType):
        return any(fits(value, item) for item in args)
    if origin is Literal:
        return any(type(value) is type(item) and value == item for item in args)
    if is_typeddict(hint):
        return isinstance(value, dict)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in (list, tuple, set):
        return isinstance(value, origin) and all(fits(item, args[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin) if origin else not isinstance(hint, type) or isinstance(value, hint)


def as_declared(value: Any, hint: Any) -> Any:
    """Return the number that a string spells where `hint` declares a number; any other value as it is."""
    origin, args = get_origin(hint), get_args(hint)
    if fits(value, hint):
        return value
    if origin is Annotated:
        return as_declared(value, args[0])
    if origin in (Union, UnionType):
        return next((item for item in (as_declared(value, arg) for arg in args) if item is not value), value)
    if origin is dict and isinstance(value, dict):
        return {key: as_declared(item, args[1]) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [as_declared(item, args[0]) for item in value]
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            return value
    return value


def ranges_missed(value: Any, hint: Any) -> list[Interval]:
    """Return the ranges that a number, or one of a list, is out of where its type is right."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [item for arg in args for item in ranges_missed(value, arg)]
    if origin in (list, tuple, set) and isinstance(value, origin):
        outside = next((item for item in value if not fits(item, args[0])), None)
        return ranges_missed(outside, args[0])
    if origin is Annotated and fits(value, args[0]):
        return [item for item in args[1:] if isinstance(item, Interval)]
    return []


def in_words(hint: Any) -> str:
    """Return the type that an annotation asks for, as an error says it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is NoneType or hint is Ellipsis:
        return "None" if hint is NoneType else "..."
    if origin is Annotated:
        return in_words(args[0])
    if origin in (Union, UnionType):
        return " | ".join(in_words(item) for item in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(item) for item in args)
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(in_words(item) for item in args)}]" if args else name


def check(place: str, value: Any, hint: Any, purpose: str = "") -> None:
    """Refuse a value of another type than declared, or out of its range; `place` and `purpose` are for the error."""
    if not fits(value, hint):
        allowed = " or ".join(map(str, ranges_missed(value, hint))) or f"be {in_words(hint)}"
        raise ValueError(f"{place}={value!r} must {allowed}. {purpose}".rstrip())


def checked(place: str, value: Any, hint: Any) -> Any:
    """Return a value as its annotation declares it: a string that spells a declared number as that number."""
    value = as_declared(value, hint)
    check(place, value, hint)
    return value


def checked_options(
    kind: str, name: str, cls: Callable[..., Any], options: dict[str, Any], leading: int = 1
) -> dict[str, Any]:
    """Return the options of a mechanism as the annotations of its constructor declare them.

    Raises:
        ValueError: if it does not have an option, or the value is of another type or out of range.
    """
    hints, result = option_hints(cls, leading), {}
    for option, value in options.items():
        if option not in hints:
            raise ValueError(unknown_name_message(f"option of the {kind} {name!r}", option, list(hints)))
        result[option] = checked(f"{kind} {name!r}: {option}", value, hints[option])
    return result


def option_hints(cls: Callable[..., Any], leading: int) -> dict[str, Any]:
    """Return the annotations of a constructor's arguments after the first `leading` ones, `Any` where it has none."""
    parameters = list(inspect.signature(cls).parameters.values())[leading:]
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)
    except NameError:  # A name that is imported for type checkers alone.
        hints = {}
    return {item.name: hints.get(item.name, item.annotation) for item in parameters}


def within(allowed: Interval, default: Any = None) -> Any:
    """Return the field of a config that holds a number in a range."""

    def check(value: Any) -> None:
        if value is not None and value not in allowed:
            raise ValueError(f"{value} must {allowed}.")

    return hub.validated_field(check, default=default)


Config = TypeVar("Config")


class FieldError(StrictDataclassFieldValidationError, ValueError):
    """A field of a config holds another type than declared, or is out of its range."""


def strict(cls: type[Config]) -> type[Config]:
    """Check the fields of a config whenever they are set, as `huggingface_hub.dataclasses.strict` does.

    Beyond that, a string that spells a number is taken for it, and errors are `ValueError`s, as everywhere here.
    """
    cls = hub.strict(cls)
    set_field: Any = cls.__setattr__
    types = {item.name: item.type for item in fields(cls)}  # type: ignore[arg-type]

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            set_field(self, name, as_declared(value, types.get(name, Any)))
        except FieldError:
            raise
        except StrictDataclassFieldValidationError as error:
            raise FieldError(name, error.__cause__) from error.__cause__  # type: ignore[arg-type]

    cls.__setattr__ = __setattr__  # type: ignore[method-assign]
    return cls
