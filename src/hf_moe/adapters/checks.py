"""What names and expressions in a configuration of LoRA experts may be, besides their types."""

import re
from typing import Any


def check_names(name: str, value: Any) -> None:
    """Refuse a name that is empty, among several or as the one expression that stands for them."""
    if isinstance(value, str):
        check_expression(name, value)
    if value == "" or (isinstance(value, list | set | tuple) and "" in value):
        raise ValueError(f"{name}={value!r} has an empty name in it, which nothing has.")


def check_expression(name: str, value: str) -> None:
    """Refuse a text that is no regular expression.

    Raises:
        ValueError: with the text and what is wrong with it.
    """
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: {value!r} is no regular expression: {error}.") from error


def refusal(refused: dict[str, list[str]]) -> str:
    """Return the message about all targets that cannot be adapted, with `*` for the numbers of layers."""
    lines = []
    for reason, keys in refused.items():
        names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", key) for key in keys)
        lines.append(f"{', '.join(names)}: {reason}")
    return "\n".join([*lines, "Or leave these targets out, by target_modules or exclude_modules."])
