"""What a folder with an adapter alone needs before it can be pushed, and how it is loaded from the Hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
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
    check_base(read_config(folder).get("base_model_name_or_path"))
    yield "adapter_model.safetensors"
    yield "README.md"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's config."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def is_path(base: str) -> bool:
    """Whether the name of a base is a path, of this machine or of another one, and no id on the Hub."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return Path(base).is_dir()


def cached_commit(base: str | None) -> str | None:
    """Return the commit of a base whose weights lie in the Hub's cache; `None` if they lie there in several, or none.

    A loaded model does not tell which commit it came from.
    """
    if not base or is_path(base):
        return None
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model")
    commits = {path.parent.name for path in folder.glob("snapshots/*/*.safetensors")}
    return commits.pop() if len(commits) == 1 else None


def check_base(base: str | None) -> None:
    """Refuse an adapter whose base nobody else could find.

    Raises:
        ValueError: if the base is missing, or no `user/name`.
    """
    if not base or "/" not in base or is_path(base):
        raise ValueError(
            f"The adapter's base model is {base!r}, which nobody else can load. Push the base first, then name it by "
            'its id on the Hub: `set_base(adapter, "user/name")` of hf_moe.hub.adapter, where adapter is the model or '
            "its saved folder, sets base_model_name_or_path in the config, and base_model in the card."
        )


def set_base(adapter: Any, repo_id: str, revision: str | None = None) -> None:
    """Name the base of an adapter by its id on the Hub, in the config and in the card.

    Args:
        adapter: the folder of a saved one, or a model with adapters.
        repo_id: `user/name`.
        revision: the commit of the base.

    Raises:
        ValueError: if `repo_id` is no `user/name`.
    """
    check_base(repo_id)
    if not isinstance(adapter, str | Path):
        # `hf-moe push` reads this file, and does without torch.
        from transformers import PreTrainedModel

        for peft_config in adapter.peft_config.values():
            peft_config.base_model_name_or_path, peft_config.revision = repo_id, revision
        base = adapter if isinstance(adapter, PreTrainedModel) else adapter.get_base_model()
        if isinstance(base, PreTrainedModel):
            # Where PEFT reads the base_model and the tags of the card.
            base.name_or_path = base.config.name_or_path = repo_id
        return
    folder = Path(adapter)
    config = read_config(folder)
    previous = config["base_model_name_or_path"]
    config |= {"base_model_name_or_path": repo_id, "revision": revision}
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
