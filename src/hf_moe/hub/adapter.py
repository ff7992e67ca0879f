"""What a folder with an adapter alone needs before it can be pushed, and how it is loaded from the Hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


CONFIG_FILE = "adapter_config.json"
# How a process that lacks the package, or has not imported it, is told what to do; see `adapters/checkpoints.py`.
LORA_EXPERTS = "MOE_LORA"

SNIPPET = """\
{imports}from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}"{revision}, trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{repo_id}", revision="{commit}")
"""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def needed_files(folder: Path) -> Iterator[str]:
    """Yield the files that an adapter cannot do without.

    Raises:
        ValueError: if its base is no repository on the Hub.
    """
    check_base(read_config(folder))
    yield "adapter_model.safetensors"
    yield "README.md"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's config."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def check_base(config: dict[str, Any]) -> None:
    """Refuse an adapter whose base nobody else could find.

    Raises:
        ValueError: if the base is missing, or no `user/name`.
    """
    base = config.get("base_model_name_or_path")
    try:
        known = base is not None and base.count("/") == 1 and not Path(base).is_dir()
        if known:
            validate_repo_id(base)
    except HFValidationError:
        known = False
    if not known:
        raise ValueError(
            f"The adapter's base model is {base!r}, which nobody else can load. Push the base first and name it: set "
            f"base_model_name_or_path to its id on the Hub (user/name) in {CONFIG_FILE}, and base_model in the card."
        )


def set_base(folder: Path, repo_id: str, revision: str | None = None) -> None:
    """Name the base of a saved adapter by its id on the Hub, in the config and in the card."""
    config = read_config(folder)
    previous = config["base_model_name_or_path"]
    config |= {"base_model_name_or_path": repo_id, "revision": revision}
    check_base(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    card = folder / "README.md"
    if card.is_file() and previous:
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(str(previous), repo_id), encoding="utf-8")


def adapter_snippet(folder: Path, repo_id: str, commit: str) -> str:
    """Return the code that loads exactly this commit of an adapter."""
    config = read_config(folder)
    class_name = (config.get("auto_mapping") or {}).get("base_model_class", "")
    multimodal = re.search(r"ForConditionalGeneration|ForImageTextToText", class_name)
    return SNIPPET.format(
        imports="import hf_moe.adapters\n" if config["peft_type"].startswith(LORA_EXPERTS) else "",
        auto_class="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM",
        base=config["base_model_name_or_path"],
        revision=f', revision="{config["revision"]}"' if config.get("revision") else "",
        repo_id=repo_id,
        commit=commit,
    )
