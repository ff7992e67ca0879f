"""Which mechanisms a module holds, and their first values."""

from collections.abc import Iterator

from torch import nn

from .routing import Connector, Experts, Objective, Router


def mechanisms_inner_first(module: nn.Module) -> Iterator[Router | Experts | Objective | Connector]:
    """Walk the mechanisms of a module, itself among them, each after those within it.

    So initialised, each finds its parts done and may change them.
    """
    for child in module.children():
        yield from mechanisms_inner_first(child)
    if isinstance(module, Router | Experts | Objective | Connector):
        yield module


def initialize_mechanisms(module: nn.Module, std: float) -> None:
    """Give the mechanisms of a module their first values."""
    for mechanism in mechanisms_inner_first(module):
        mechanism.initialize(std)
