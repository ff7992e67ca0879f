"""Adapter folders that say what they need.

PEFT looks an adapter's method up by the `peft_type` of its config before any other code could run, and names in its
error what it did not find. So the config on disk says there which package knows the method: a process without it
fails with `KeyError: 'MOE_LORA: run pip install ...'`.

And a push is refused while the base is a folder that nobody else has.
"""

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from transformers.trainer_utils import HubStrategy

from ..hub.adapter import cached_commit


INSTRUCTIONS = 'run `pip install "hf-moe[train]"` and `import hf_moe.adapters`'


def saved_peft_type(name: str) -> str:
    """Return what stands for a method of this package in the configs of saved adapters."""
    return f"{name}: {INSTRUCTIONS}"


def accept_saved_type(name: str, config_cls: Any) -> None:
    """Let PEFT find a registered method under what stands in saved configs, too; safe to call again."""
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_peft_type(name)] = config_cls


def complete_saved_config(folder: str | Path, name: str) -> None:
    """Make the config in `folder` name the commit of the base, and tell a process without this package what to do."""
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["revision"] = config["revision"] or cached_commit(config["base_model_name_or_path"])
    config["peft_type"] = saved_peft_type(name)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


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
