"""What a checkpoint needs to live on the Hub without this package."""

from collections.abc import Callable
from typing import Any

from ..configuration.configuration_hf_moe import SAVE_HOOKS


def install() -> None:
    """Make every save of a config or a processor write the code it runs; safe to call again."""
    if _bundle not in SAVE_HOOKS:
        SAVE_HOOKS.append(_bundle)


def _bundle(obj: Any, folder: str) -> Callable[[], None]:
    # Imported at the first save: it needs torch, and `import hf_moe` stays light.
    from .bundle import prepare_bundle

    return prepare_bundle(obj, folder)


__all__ = ["install"]
