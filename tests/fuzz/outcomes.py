"""What becomes of malformed input: one word for every case."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError


# Errors that a reader of input raises on purpose, if they name what is wrong.
SPOKEN = (ValueError, TypeError, OSError, KeyError, ImportError, StrictDataclassError)


@dataclass(frozen=True)
class Case:
    """One value in one place.

    Attributes:
        group: what is fuzzed, such as `"config"`.
        place: the field, file or row, as an error should call it.
        value: what stands there.
        run: does what a user would do with it, and returns what comes out: a tensor, or a tree of plain values.
        usual: does the same with the default in its place.
        sensible: whether the value means something there, so that it may change a result.
    """

    group: str
    place: str
    value: Any
    run: Callable[[], Any]
    usual: Callable[[], Any]
    sensible: bool = False

    def __str__(self) -> str:
        return f"{self.group}: {self.place}={short(self.value)}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        word: `"clear"`: refused, by an error that names the place or the value. `"harmless"`: the value means
            something and works, or changes nothing, or a warning names it. `"confusing"`: refused by an error that
            names neither, or refused although it means something. `"silent"`: nonsense that changes a result.
        detail: the error, or what came out.
    """

    word: str
    detail: str = ""


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names(message: str, place: str, value: Any) -> bool:
    """Whether an error names the place (its last part), or the value where that cannot be there by chance."""
    words = " ".join(message.lower().replace("_", " ").split())
    if place.split(".")[-1].lower().replace("_", " ") in words:
        return True
    parts = [*value, value] if isinstance(value, dict) else [value]
    return any(len(repr(item)) > 2 and not isinstance(item, int) and repr(item)[:40] in message for item in parts)


def judge(case: Case) -> Outcome:
    """Run a case and say what became of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = case.run()
        except SPOKEN as error:
            spoken = names(str(error), case.place, case.value) and not case.sensible
            return Outcome("clear" if spoken else "confusing", f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("confusing", f"{type(error).__name__}: {error}")
        if case.sensible:
            return Outcome("harmless" if finite(result) else "silent", "accepted")
        if any(names(str(item.message), case.place, case.value) for item in said):
            return Outcome("harmless", "warned")
        usual = case.usual()
    return Outcome("harmless") if same(result, usual) else Outcome("silent", f"{short(result)} for {short(usual)}")


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def finite(result: Any) -> bool:
    """Whether a result holds no NaN and no infinity."""
    if isinstance(result, torch.Tensor):
        return bool(result.isfinite().all())
    if isinstance(result, list | tuple):
        return all(map(finite, result))
    return not isinstance(result, float) or math.isfinite(result)
