"""Plain data, as YAML gives it, checked against declared types.

Declared types are those of dataclasses and `TypedDict`s: numbers, text, lists, mappings, unions and literals of them,
with a [`Range`] where not every number makes sense. A value that says the same in another form (`"1e-2"` for a float,
`"yes"` for a bool) becomes what is declared; whatever else differs is refused by its place.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from ..configuration.configuration_hf_moe import unknown_name_message


TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: from `low` on, above `above`, up to `high`."""

    low: float | None = None
    above: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        limits = (("of at least", self.low), ("above", self.above), ("of at most", self.high))
        return " and ".join(f"{word} {limit:.10g}" for word, limit in limits if limit is not None)


def read_yaml(text: str, place: str) -> Any:
    """Return what a YAML text holds, read as YAML 1.2: `no` is text and `1e-2` a number.

    Raises:
        ValueError: if it is not YAML, or a mapping has a key twice; `place` and the line are named.
    """
    try:
        return yaml.load(text, _CoreLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"The {place} is not YAML: {error}") from error


class _CoreLoader(yaml.SafeLoader):
    """YAML with the scalars of its core schema. PyYAML's own are of YAML 1.1, where `no` and `on` are booleans."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _name, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), None)
_CoreLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def fit(value: Any, kind: Any, place: str, key: str = "") -> Any:
    """Return `value` as the declared type `kind` has it.

    Args:
        value: plain data.
        kind: a type, or a type expression.
        place: what the value is from, for errors: `"recipe x.yaml"`.
        key: of the value in it: `"evaluation.batch_size"`.

    Raises:
        ValueError: if it is no such value; the error names place, key, value and what is expected.
    """
    if kind is Any:
        return value
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
        fitted = fit(value, kind, place, key)
        if fitted not in limits:
            raise _refusal(value, place, key, f"a number {limits}")
        return fitted
    if is_typeddict(kind) or is_dataclass(kind):
        return _fit_fields(value, kind, place, key)
    if get_origin(kind) in (Union, UnionType):
        return _fit_union(value, kind, place, key)
    if get_origin(kind) is Literal:
        return _fit_choice(value, get_args(kind), kind, place, key)
    if get_origin(kind) is list or kind is list:
        item_kind = next(iter(get_args(kind)), Any)
        if not isinstance(value, list):
            raise _refusal(value, place, key, describe(kind))
        return [fit(item, item_kind, place, f"{key}.{index}") for index, item in enumerate(value)]
    if get_origin(kind) is dict or kind is dict:
        item_kind = (get_args(kind) or (Any, Any))[1]
        if not isinstance(value, Mapping):
            raise _refusal(value, place, key, describe(kind))
        return {name: fit(item, item_kind, place, f"{key}.{name}") for name, item in value.items()}
    return _fit_scalar(value, kind, place, key)


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


def describe(kind: Any) -> str:
    """Return how an error names a declared type."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    if kind in names:
        return names[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list, each item {describe(arguments[0])}"
    if kind is list:
        return "a list"
    if origin is dict or kind is dict or is_typeddict(kind) or is_dataclass(kind):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(item.value) for item in kind)
    return getattr(kind, "__name__", str(kind))


def _refusal(value: Any, place: str, key: str, expected: str) -> ValueError:
    shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
    quotes = ""
    if isinstance(value, bool | int | float) and "text" in expected:
        quotes = " Write it in quotes if it is meant as text."
    named = f"{key}={shown}" if key else shown
    return ValueError(f"The {place} has {named}, expected {expected}.{quotes}")


def _fit_fields(value: Any, kind: Any, place: str, key: str) -> dict[str, Any]:
    """Return the fields of a dataclass or `TypedDict` that are given; what is unset stays so."""
    if not isinstance(value, Mapping):
        raise _refusal(value, place, key, "a mapping")
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
        if item is not None or not (is_dataclass(kind) and _is_section(kinds[name])) or name in required
    }
    missing = [name for name in required if given.get(name) is None]
    if missing:
        raise ValueError(f"The {place} lacks {', '.join(f'{key}.{name}' if key else name for name in missing)}.")
    return {name: fit(item, kinds[name], place, f"{key}.{name}" if key else name) for name, item in given.items()}


def _is_section(kind: Any) -> bool:
    return is_typeddict(kind) or get_origin(kind) in (list, dict) or kind in (list, dict)


def _fit_union(value: Any, kind: Any, place: str, key: str) -> Any:
    members = get_args(kind)
    if any(isinstance(item, type) and issubclass(item, Enum) for item in members):
        # `Enum | str` means the value of one.
        members = tuple(item for item in members if item is not str)
        if len(members) == 1:
            return fit(value, members[0], place, key)
    same = [item for item in members if item is not str and _is_instance(value, item)]
    for member in [*same, *(item for item in members if item not in same)]:
        try:
            return fit(value, member, place, key)
        except ValueError:
            if member in same and not isinstance(value, int | float | str | None):
                raise  # A mapping or list of the right kind: what is wrong lies inside.
    raise _refusal(value, place, key, describe(kind))


def _is_instance(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value is item for item in get_args(kind))
    if is_typeddict(kind) or is_dataclass(kind):
        return isinstance(value, Mapping)
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else get_origin(kind) or kind
    return type(value) is kind or (isinstance(value, Mapping) and kind is dict)


def _fit_scalar(value: Any, kind: Any, place: str, key: str) -> Any:
    if kind is bool:
        word = str(value).lower()
        if isinstance(value, bool | int | str) and word in (*TRUE, *FALSE):
            return word in TRUE
    elif kind in (int, float):
        if (number := _number(value)) is not None and (kind is float or number == int(number)):
            return int(number) if kind is int else number
    elif isinstance(kind, type) and issubclass(kind, Enum):
        # `false` where YAML 1.1 would have read the word.
        return _fit_choice("no" if value is False else value, [item.value for item in kind], kind, place, key)
    elif isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, str) and not value.strip()):
        return value
    raise _refusal(value, place, key, describe(kind))


def _fit_choice(value: Any, known: Sequence[Any], kind: Any, place: str, key: str) -> Any:
    if any(value == item and type(value) is type(item) for item in known):
        return value
    if isinstance(value, str):
        raise ValueError(unknown_name_message(f"value of {key} in the {place}", value, list(map(str, known))))
    raise _refusal(value, place, key, describe(kind))


def _number(value: Any) -> int | float | None:
    """Return the finite number that a value is, or writes."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = value if isinstance(value, int | float) else float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, str) and number == int(number) and "." not in value else number
