# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
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
