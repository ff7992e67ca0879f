"""Plain data, as YAML gives it, checked against declared types.

Declared types are those of dataclasses and `TypedDict`s: numbers, text, lists, mappings, unions and literals of them,
with an [`Interval`] where not every number makes sense. A value that says the same in another form (`"1e-2"` for a
float, `"yes"` for a bool) becomes what is declared; whatever else differs is refused by its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..configuration.checks import as_declared, check, fits, in_words, unknown_name_message


TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# What a container may be given as.
SHAPES: dict[Any, type] = {dict: Mapping, list: list}


def fit(value: Any, kind: Any, place: str, key: str = "") -> Any:
    """Return `value` as the declared type `kind` has it.

    Args:
        value: plain data.
        kind: a type, or a type expression.
        place: what the value is from, for errors: `"recipe x.yaml"`.
        key: of the value in it: `"evaluation.batch_size"`.

    Raises:
        ValueError: if it is no such value; the error names place, key, value and what is allowed.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind) or is_dataclass(kind):
        return _fit_fields(value, kind, place, key)
    if origin in (Union, UnionType):
        return _fit_union(value, arguments, place, key)
    if _choices(kind) and isinstance(value, str) and value not in _choices(kind):
        known = list(map(str, _choices(kind)))
        raise ValueError(unknown_name_message(f"value of {key} in the {place}", value, known))
    if (origin or kind) is list and isinstance(value, list):
        return [fit(item, next(iter(arguments), Any), place, f"{key}.{index}") for index, item in enumerate(value)]
    if (origin or kind) is dict and isinstance(value, Mapping):
        item_kind = (arguments or (Any, Any))[1]
        return {name: fit(item, item_kind, place, f"{key}.{name}") for name, item in value.items()}
    value = _as_written(value, kind)
    if isinstance(kind, type) and issubclass(kind, Enum) and value in _choices(kind):
        return value
    if kind is str and isinstance(value, str) and not value.strip():
        raise ValueError(f"The {place}: {key}={value!r} is blank: write a text, or leave it out.")
    plain = kind is str and isinstance(value, bool | int | float)
    check(f"The {place}: {key}", value, kind, "Write it in quotes if it is meant as text." if plain else "")
    return value


def refuse_words(value: Any, place: str, key: str) -> None:
    """Refuse `yes`, `no`, `on` and `off` among options whose types are not declared here.

    YAML 1.1 reads them as booleans, 1.2 as text, which a reader of the option may take for true.

    Raises:
        ValueError: naming the first.
    """
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        refuse_words(item, place, f"{key}.{name}")
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        raise ValueError(f"The {place} has {key}={value}: write true or false.")


def _choices(kind: Any) -> list[Any]:
    """Return what a value of a `Literal` or an `Enum` may be; nothing of other types."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [item.value for item in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _as_written(value: Any, kind: Any) -> Any:
    """Return the bool, number or word that a value writes, where one is declared."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    word = str(value).lower()
    if plain is bool and isinstance(value, int | str) and word in (*TRUE, *FALSE):
        return word in TRUE
    if plain is int and not isinstance(value, bool):
        number = as_declared(value, float)
        return int(number) if isinstance(number, float) and number.is_integer() else value
    if value is False and "no" in _choices(kind):  # what YAML 1.1 makes of the word
        return "no"
    return as_declared(value, kind)


def _fit_fields(value: Any, kind: Any, place: str, key: str) -> dict[str, Any]:
    """Return the fields of a dataclass or `TypedDict` that are given; what is unset stays so."""
    check(f"The {place}: {key}", value, Mapping)
    kinds = {
        name: get_args(declared)[0] if get_origin(declared) is Required else declared
        for name, declared in get_type_hints(kind, include_extras=True).items()
    }
    where = f"field of {key} in the {place}" if key else f"field of the {place}"
    for name in value:
        if name not in kinds:
            raise ValueError(unknown_name_message(where, str(name), list(kinds)))
    if is_dataclass(kind):
        required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    else:
        required = [name for name in kinds if name in kind.__required_keys__]
    # A section that is left empty in YAML is null.
    given = {
        name: item
        for name, item in value.items()
        if item is not None or not (is_dataclass(kind) and _shape(kinds[name]) in SHAPES) or name in required
    }
    missing = [name for name in required if given.get(name) is None]
    if missing:
        raise ValueError(f"The {place} lacks {', '.join(f'{key}.{name}' if key else name for name in missing)}.")
    return {name: fit(item, kinds[name], place, f"{key}.{name}" if key else name) for name, item in given.items()}


def _fit_union(value: Any, members: Sequence[Any], place: str, key: str) -> Any:
    if any(isinstance(item, type) and issubclass(item, Enum) for item in members):
        members = [item for item in members if item is not str]  # `Enum | str` means the value of one
    others = [item for item in members if item is not NoneType]
    same_shape = [item for item in others if isinstance(value, SHAPES.get(_shape(item), ()))]
    if value is not None and (same_shape or len(others) == 1):
        return fit(value, (same_shape or others)[0], place, key)  # what is wrong lies inside
    if value is None and len(others) < len(members):
        return value
    for member in sorted(others, key=lambda item: not fits(value, item)):
        try:
            return fit(value, member, place, key)
        except ValueError:
            continue
    raise ValueError(f"The {place}: {key}={value!r:.100} must be {in_words(Union[tuple(members)])}.")  # noqa: UP007


def _shape(kind: Any) -> Any:
    return dict if is_typeddict(kind) or is_dataclass(kind) else get_origin(kind) or kind
