"""The values that stand where others are meant, and what each number may be.

The table is written by hand: a check that asked the library what it allows could not fail.
"""

import math
from typing import Any


NONSENSE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    97,
    0.0,
    0.5,
    2.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "8",
    "1e-3",
    "nan",
    b"x",
    (),
    [],
    [-1],
    [1, 2],
    [0.5, 0.5],
    ["x"],
    [None],
    {},
    {"x": 1},
    {"default": -1},
    {"99": 1, "default": 1},
    {"name": 3},
    {"default": {"default": "x"}},
    object(),
)


def number(value: Any) -> float | None:
    """Return the number that a value is, or that a string spells, `None` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def whole(value: Any, low: float, high: float = 1e4) -> bool:
    """Whether a value is a whole number within bounds; 8.0 is none, "8" is."""
    found = number(value)
    written_whole = isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    return found is not None and written_whole and low <= found <= high


def real(value: Any, low: float, high: float = math.inf, open_low: bool = False) -> bool:
    """Whether a value is a finite number within bounds."""
    found = number(value)
    if found is None or not math.isfinite(found):
        return False
    return (low < found if open_low else low <= found) and found <= high


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def optional(test: Any) -> Any:
    return lambda value: value is None or test(value)


def one_of(*allowed: Any) -> Any:
    return lambda value: value in allowed if isinstance(value, str) else False


def positive(value: Any) -> bool:
    return real(value, 0, open_low=True)


def share(value: Any) -> bool:
    return real(value, 0, 1)


def count(value: Any) -> bool:
    return whole(value, 1)


def nothing(value: Any) -> bool:
    return False
