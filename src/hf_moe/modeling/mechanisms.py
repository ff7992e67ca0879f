"""Finds a mechanism by its name. In a bundle, a generated file of the same name lists the ones it carries."""

import importlib
import pkgutil

from ..configuration.configuration_hf_moe import unknown_name_message
from .registry import KINDS, registered


FOLDERS = {
    "router": "routers",
    "experts": "experts",
    "block": "blocks",
    "attention": "attention",
    "layer": "layers",
    "objective": "objectives",
    "connector": "connectors",
    "host": "hosts",
}


def mechanism_names(kind: str) -> list[str]:
    """Return the names of all mechanisms of `kind`: this library's and the registered ones."""
    if kind not in KINDS:
        raise ValueError(unknown_name_message("kind of mechanism", kind, list(KINDS)))
    package = importlib.import_module(f"{__package__}.{FOLDERS[kind]}")
    return sorted({item.name for item in pkgutil.iter_modules(package.__path__)} | set(registered(kind)))


def get_mechanism(kind: str, name: str) -> type:
    """Return the class of a mechanism.

    Raises:
        ValueError: if no mechanism of `kind` has that name; the nearest names are given.
    """
    if name not in registered(kind):
        if name not in mechanism_names(kind):
            raise ValueError(unknown_name_message(kind, name, mechanism_names(kind)))
        importlib.import_module(f"{__package__}.{FOLDERS[kind]}.{name}")
    return registered(kind)[name]
