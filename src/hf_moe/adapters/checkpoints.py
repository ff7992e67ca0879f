"""Adapter folders that say what they need.

PEFT looks an adapter's method up by the `peft_type` of its config before any other code could run, and names in its
error what it did not find. So the config on disk says there which package knows the method: a process without it
fails with `KeyError: 'MOE_LORA: run pip install ...'`.

A push is refused while the base is a folder that nobody else has. And a folder that is damaged, or was written by a
newer version, says so when it is loaded.
"""

import json
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from packaging.version import InvalidVersion, Version
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from transformers.trainer_utils import HubStrategy

from .. import __version__
from ..hub.adapter import cached_commit, portable_name


INSTRUCTIONS = 'run `pip install "hf-moe[train]"` and `import hf_moe.adapters`'


def saved_peft_type(name: str) -> str:
    """Return what stands for a method of this package in the configs of saved adapters."""
    return f"{name}: {INSTRUCTIONS}"


def accept_saved_type(name: str, config_cls: Any) -> None:
    """Let PEFT find a registered method under what stands in saved configs, too; safe to call again."""
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_peft_type(name)] = config_cls


def complete_saved_config(folder: str | Path, name: str) -> None:
    """Make the config in `folder` name the version that wrote it and where its base lies, and say what it needs."""
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["hf_moe_version"] = __version__
    config["base_model_name_or_path"] = portable_name(config["base_model_name_or_path"])
    config["revision"] = config["revision"] or cached_commit(config["base_model_name_or_path"])
    config["peft_type"] = saved_peft_type(name)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def check_version(version: str | None) -> None:
    """Warn of a config that a newer version has written, whose fields may mean more than this one knows.

    Raises:
        ValueError: if it is no version.
    """
    try:
        newer = version is not None and Version(version) > Version(__version__)
    except InvalidVersion as error:
        raise ValueError(f"hf_moe_version={version!r} is no version, such as {__version__!r}.") from error
    if newer:
        warnings.warn(
            f"The adapter was saved by hf_moe {version}, and this is {__version__}: what it sets that this version "
            "does not know is ignored or refused. Update with `pip install --upgrade hf-moe`.",
            stacklevel=2,
        )


def check_complete(expected: set[str], found: set[str], config: Any) -> None:
    """Refuse weights that lack some of an adapter's, which would be left as they were drawn.

    Raises:
        ValueError: naming the keys, and the file where it is known.
    """
    missing = sorted(expected - found)
    if missing:
        where = getattr(config, "weights_file", None) or "The adapter's weights"
        raise ValueError(
            f"{where} lack {len(missing)} of {len(expected)} tensors of the adapter, among them {missing[:3]}: the "
            "file is damaged, or belongs to another adapter_config.json or another base."
        )


def is_saved_for_a_push() -> bool:
    """Whether a calling frame is a push: a method `push_to_hub`, or `Trainer` at a checkpoint that it will push.

    Models and `Trainer` push what `save_pretrained` has written, and tell it nothing of that: no argument, no hook and
    no state says so. What must not leave the machine can be refused there only by looking at who calls, short of
    replacing their methods.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "push_to_hub" and "self" in frame.f_locals:
            return True
        if name == "_save_checkpoint" and frame.f_globals["__name__"] == "transformers.trainer":
            args = frame.f_locals["self"].args
            return args.push_to_hub and args.hub_strategy != HubStrategy.END
        frame = frame.f_back
    return False
