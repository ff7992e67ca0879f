"""What config, model and processor share where they travel: the release that they need, and the package."""

from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version


MINIMUM_TRANSFORMERS = "5.23.0"
if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"hf_moe models need transformers >= {MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers>={MINIMUM_TRANSFORMERS}'"
    )


class Package:
    """What the installed package adds to a config, a processor or a model; from a checkpoint they run without it.

    Attributes:
        before_save: called as `before_save(saved_object, folder)` before a config or a processor is written, so that a
            refused save leaves the old checkpoint whole; what it returns is called afterwards.
        push: called as `push(model, repo_id, **options)` in place of Transformers' own upload of a model.
        from_host: called as `from_host(host, **options)` to turn a model of Transformers into a MoE.
    """

    before_save: Callable[[Any, str], Callable[[], None]] | None = None
    push: Callable[..., Any] | None = None
    from_host: Callable[..., Any] | None = None


PACKAGE = Package()


def save_with_package(obj: Any, save: Callable[..., Any], folder: Any, push_to_hub: bool, kwargs: dict) -> Any:
    """Save `obj` with what the package adds, and only then upload: Transformers would upload before it is written."""
    finish = None if PACKAGE.before_save is None else PACKAGE.before_save(obj, str(folder))
    result = save(folder, **({} if push_to_hub else kwargs))
    if finish is not None:
        finish()
    if push_to_hub:
        obj.push_to_hub(kwargs.pop("repo_id", str(folder).rstrip("/").rsplit("/", 1)[-1]), **kwargs)
    return result
