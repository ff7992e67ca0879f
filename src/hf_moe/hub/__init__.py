"""What a checkpoint needs to live on the Hub without this package."""

from collections.abc import Callable
from typing import Any

from ..configuration.saving import PACKAGE


def install() -> None:
    """Make every save of a config or a processor write its code, every push of a model a card; safe to call again."""
    PACKAGE.before_save = _bundle
    PACKAGE.push = _push


def _bundle(obj: Any, folder: str) -> Callable[[], None]:
    # Imported at the first save: it needs torch, and `import hf_moe` stays light.
    from .bundle import prepare_bundle

    return prepare_bundle(obj, folder)


def _push(model: Any, repo_id: str, **options: Any) -> Any:
    from .methods import push_model

    return push_model(model, repo_id, **options)


__all__ = ["install"]
