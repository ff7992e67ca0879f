"""Which mechanisms a module holds, and their first values."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .block import Block
from .replacement import Replacement
from .routing import Connector, Experts, Objective, Router, SharedPart


MECHANISMS = (Block, Replacement, Router, SharedPart, Experts, Objective, Connector)


def mechanisms_inner_first(module: nn.Module) -> Iterator[Any]:
    """Walk the mechanisms of a module, itself among them, each after those within it.

    So initialised, each finds its parts done and may change them.
    """
    for child in module.children():
        yield from mechanisms_inner_first(child)
    if isinstance(module, MECHANISMS):
        yield module


def initialize_mechanisms(module: nn.Module, std: float) -> None:
    """Give the mechanisms of a module their first values."""
    for mechanism in mechanisms_inner_first(module):
        mechanism.initialize(std)


def _initialized_parts(mechanism: nn.Module) -> Iterable[nn.Module]:
    """Return the modules that a mechanism's `initialize` has given their first values.

    Plain layers in blocks and replacements, such as a shared branch or the copy of a projection, are initialised by
    the host's class, unless the block says that it does.
    """
    if isinstance(mechanism, Block):
        return mechanism.initialized_parts()
    return [mechanism] if isinstance(mechanism, Replacement) else mechanism.modules()


def initializer_std(config: Any) -> float:
    """Return the standard deviation of fresh weights: the config's own, or its decoder's."""
    text = config.get_text_config(decoder=True)
    given = (getattr(item, "initializer_range", None) for item in (config, text))
    return next((std for std in given if std is not None), 0.02)


class MechanismInitialisation:
    """Gives the mechanisms of a model their first values; to be inherited before `PreTrainedModel`."""

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # Transformers hands a module to the nearest enclosing model, often the host's, which knows no stacked
        # parameters: ours are initialised first, and marked.
        std = initializer_std(self.config)  # type: ignore[attr-defined]
        for mechanism in mechanisms_inner_first(self):
            if not getattr(mechanism, "_is_hf_initialized", False):
                mechanism.initialize(std)
                for part in _initialized_parts(mechanism):
                    part._is_hf_initialized = True
        super().initialize_weights()  # type: ignore[misc]
