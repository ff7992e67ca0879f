"""What a folder with an adapter alone needs before it can be pushed, and how it is loaded from the Hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# In configs saved before 0.1.0 a sentence follows.
LORA_EXPERTS = "MOE_LORA"

ADAPTER_SNIPPET = """\
{imports}from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}"{revision}{trust})
model = PeftModel.from_pretrained(base, "{repo_id}", revision="{commit}")
"""
GENERATING = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
)
PRETRAINING = "AutoModelForPreTraining"
# For bases of an unknown class.
BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def needed_files(folder: Path) -> Iterator[str]:
    """Yield the files that an adapter cannot do without; refuse a base that nobody finds, and damaged weights."""
    check_base(read_adapter_config(folder).get("base_model_name_or_path"), folder)
    check_weights(folder)
    yield WEIGHTS_FILE
    yield "README.md"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's config."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are cut short, by their header."""
    path = folder / WEIGHTS_FILE
    try:
        if path.is_file():
            safe_open(path, "np")  # which imports no torch
    except SafetensorError as error:
        raise OSError(f"{path} is damaged or cut short ({error}): copy, download or save it again.") from error


def is_local_base(base: str, folder: Path | None = None) -> bool:
    """Whether the name of a base is a path, of this machine or of another one, and no id on the Hub.

    A base is often beside the `folder` of its adapter.
    """
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return any((start / base).is_dir() for start in (Path(), *(folder.resolve().parents if folder else ())))


def portable_name(base: str | None) -> str | None:
    """Return the name of a base as configs record it: a relative folder as `./folder`, which no id on the Hub is."""
    if base and not Path(base).is_absolute() and not base.startswith(".") and Path(base).is_dir():
        return f"./{base}"
    return base


def cached_commit(base: str | None) -> str | None:
    """Return the commit of a base whose weights lie in the Hub's cache; `None` if they lie there in several, or none.

    A loaded model does not tell which commit it came from.
    """
    if not base or is_local_base(base):
        return None
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model")
    commits = {path.parent.name for path in folder.glob("snapshots/*/*.safetensors")}
    return commits.pop() if len(commits) == 1 else None


def check_base(base: str | None, folder: Path | None = None) -> None:
    """Refuse an adapter whose base nobody else could find: it is missing, or a path as [`is_local_base`] tells."""
    if not base or is_local_base(base, folder):
        raise ValueError(
            f"The adapter's base model is {base!r}, which nobody else can load. Push the base first, then name it by "
            'its id on the Hub: `set_base(adapter, "user/name")` of hf_moe.hub.adapter_folder, where adapter is the '
            "model or its saved folder, sets base_model_name_or_path in the config, and base_model in the card."
        )


def set_base(adapter: Any, repo_id: str, revision: str | None = None) -> None:
    """Name the base of an adapter by its id on the Hub, in the config and in the card.

    Args:
        adapter (`Any`): the folder of a saved one, or a model with adapters.
        repo_id (`str`): `user/name`, or `name` alone where a model has no user.
        revision (`str`, *optional*): the commit of the base.

    Raises:
        ValueError: if `repo_id` is no id on the Hub.
    """
    check_base(repo_id)
    if not isinstance(adapter, str | Path):
        # `hf-moe push` reads this file, and does without torch.
        from transformers import PreTrainedModel

        for peft_config in adapter.peft_config.values():
            peft_config.base_model_name_or_path, peft_config.revision = repo_id, revision
        base = adapter if isinstance(adapter, PreTrainedModel) else adapter.get_base_model()
        if isinstance(base, PreTrainedModel):
            # PEFT reads the base_model and the tags of the card from here.
            base.name_or_path = base.config.name_or_path = repo_id
        return
    folder = Path(adapter)
    config = read_adapter_config(folder)
    previous = config["base_model_name_or_path"]
    config |= {"base_model_name_or_path": repo_id, "revision": revision}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    card = folder / "README.md"
    if card.is_file() and previous:
        # In the metadata and in code, with or without the dot of a relative folder.
        name = rf"(?<=[:\s\"'(/])(?:\./)?{re.escape(previous.removeprefix('./'))}(?=[\s\"')]|$)"
        text = re.sub(name, repo_id, card.read_text(encoding="utf-8"))
        card.write_text(text, encoding="utf-8")


def adapter_snippet(folder: Path, repo_id: str, commit: str) -> str:
    """Return the code that loads exactly this commit of an adapter."""
    config = read_adapter_config(folder)
    class_name, own_code = _base_class(config)
    return ADAPTER_SNIPPET.format(
        imports="import hf_moe.adapters\n" if config["peft_type"].startswith(LORA_EXPERTS) else "",
        auto_class=auto_class(class_name) or BY_TASK.get(config.get("task_type") or "", "AutoModelForCausalLM"),
        base=config["base_model_name_or_path"],
        revision=f', revision="{config["revision"]}"' if config.get("revision") else "",
        trust=", trust_remote_code=True" if own_code else "",
        repo_id=repo_id,
        commit=commit,
    )


def has_own_code(module: str) -> bool:
    """Whether the class of a model that comes from this module travels in its checkpoint."""
    return not module.startswith("transformers.")


def auto_class(class_name: str) -> str | None:
    """Return the Auto class that loads models of a class; `None` where the class is unknown."""
    if not class_name:
        return None
    # `hf-moe push` reads this file, and does without torch.
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None:
            classes = mapping._model_mapping.values()  # names, or several of them
            if any(class_name in ([item] if isinstance(item, str) else item) for item in classes):
                found.append(name)
    # What loads those that generate is in other lists besides, and nearly all are in that of pretraining.
    order = [*GENERATING, *sorted(set(found) - {PRETRAINING}), PRETRAINING]
    if not found and class_name.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText"  # as ours
    return next((name for name in order if name in found), None)


def _base_class(config: dict[str, Any]) -> tuple[str, bool]:
    """Return the class of an adapter's base, empty if it is unknown, and whether its code travels with it."""
    recorded = config.get("auto_mapping")
    if recorded:
        return recorded["base_model_class"], has_own_code(recorded["parent_library"])
    path = try_to_load_from_cache(config["base_model_name_or_path"], "config.json", revision=config.get("revision"))
    if not isinstance(path, str):
        return "", False
    base = json.loads(Path(path).read_text(encoding="utf-8"))
    return (base.get("architectures") or [""])[0], "auto_map" in base
