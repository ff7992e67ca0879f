"""What config, model and processor share where they travel: the release that they need, and the hooks of a save."""

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

# Called as `hook(saved_object, folder)` before a config or a processor is written, so that a refused save leaves the
# old checkpoint whole; what it returns is called afterwards. The package fills it with the function that writes the
# code bundle; in a bundle it stays empty, since Transformers copies bundled code by itself.
SAVE_HOOKS: list[Callable[[Any, str], Callable[[], None]]] = []
# Called as `hook(model, repo_id, **options)` in place of Transformers' own upload of a model. The package puts one
# here that writes the card and names the version; in a bundle it stays empty.
PUSH_HOOKS: list[Callable[..., Any]] = []


def save_with_hooks(obj: Any, save: Callable[..., Any], folder: Any, push_to_hub: bool, kwargs: dict) -> Any:
    """Save `obj`, run the hooks, and only then upload: Transformers would upload before the code is written."""
    finish = [hook(obj, str(folder)) for hook in SAVE_HOOKS]
    result = save(folder, **({} if push_to_hub else kwargs))
    for write in finish:
        write()
    if push_to_hub:
        obj.push_to_hub(kwargs.pop("repo_id", str(folder).rstrip("/").rsplit("/", 1)[-1]), **kwargs)
    return result
