"""Opens hosts with MoE layers and compares them with what was recorded when they were saved.

Run as a program, `remote|local FOLDER ...`: `remote` where `hf_moe` cannot be imported, with the code of
the folder; `local` with the installed classes and no code of the folder. The last line of the output is a JSON
object: folder to findings.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from helpers.hub.open_checkpoint import NoHfMoe


REFERENCE = "reference.pt"
AUTO_CLASSES = (AutoModelForImageTextToText, AutoModel, AutoModelForMultimodalLM)
EXACT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def largest_difference(model, reference) -> float:
    with torch.no_grad():
        logits = model.eval()(**reference["inputs"]).logits
    return (logits - reference["logits"])[reference["inputs"]["attention_mask"].bool()].abs().max().item()


def keys_of(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sorted(weights.keys())


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != REFERENCE)


def inspect(folder: Path, trust: bool) -> dict:
    reference = torch.load(folder / REFERENCE)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    found: dict = {"differences": {}, "config": type(config).__module__}
    for auto_class in AUTO_CLASSES:
        model = auto_class.from_pretrained(folder, trust_remote_code=trust)
        found["differences"][auto_class.__name__] = largest_difference(model, reference)
        found["class"], found["module"] = type(model).__name__, type(model).__module__
    ids = model.generate(**reference["inputs"], **EXACT)
    found["ids_equal"] = ids.tolist() == reference["ids"].tolist()
    again = folder.with_name(f"{folder.name}_again")
    model.save_pretrained(again)
    found["again"] = largest_difference(AutoModel.from_pretrained(again, trust_remote_code=trust), reference)
    found["same_keys"] = keys_of(again) == keys_of(folder)
    found["files"], found["files_again"] = files_of(folder), files_of(again)
    return found


def main(way: str, folders: list[str]) -> None:
    if way == "remote":
        sys.meta_path.insert(0, NoHfMoe())
    else:
        import hf_moe

        hf_moe.register()
    findings = {Path(folder).name: inspect(Path(folder), trust=way == "remote") for folder in folders}
    print(json.dumps(findings))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
