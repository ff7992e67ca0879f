"""Opens checkpoints where `hf_moe` cannot be imported and compares them with what was recorded when they were saved.

Run as a program, `FOLDER ...`, in any environment that has torch, transformers and pillow. The last
line of the output is a JSON object: folder to findings.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)


REFERENCE = "reference.pt"


class NoHfMoe(importlib.abc.MetaPathFinder):
    """Makes `import hf_moe` fail, installed or not."""

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "hf_moe":
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


def sample_image():
    return Image.new("RGB", (16, 16), (200, 40, 90))


def largest_difference(model, reference):
    with torch.no_grad():
        logits = model.eval()(**reference["inputs"]).logits
    return (logits - reference["logits"]).abs().max().item()


def open_model(source: Path | str, reference: dict, **options) -> dict:
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, **options)
    ids = model.generate(**reference["inputs"], max_new_tokens=5, do_sample=False)
    return {
        "class": type(model).__name__,
        "difference": largest_difference(model, reference),
        "ids_equal": ids.tolist() == reference["ids"].tolist(),
    }


def open_processor(source: Path | str, reference: dict, **options) -> dict:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **options)
    inputs = processor(images=[sample_image()], text=[reference["text"]], return_tensors="pt")
    # Without torchvision Transformers takes its Pillow image processor, which rounds otherwise.
    equal = [
        torch.allclose(inputs[name].float(), value.float(), atol=1e-5) for name, value in reference["inputs"].items()
    ]
    return {"processor": type(processor).__name__, "inputs_equal": all(equal)}


def open_everything(folder: Path, reference: dict) -> dict:
    """Load model and processor through every door, save them again from the remote classes, and load that."""
    found = {}
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        found[auto_class.__name__] = largest_difference(model, reference)
    again = folder.with_name(f"{folder.name}_again")
    model.save_pretrained(again)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    found["again"] = open_model(again, reference) | open_processor(again, reference)
    answer = pipeline("image-text-to-text", model=str(again), trust_remote_code=True)(
        images=sample_image(), text=reference["text"], generate_kwargs={"max_new_tokens": 5, "do_sample": False}
    )
    found["pipeline"] = answer[0]["generated_text"]
    try:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        found["untrusted"] = str(error)
    return found


def inspect(folder: Path) -> dict:
    found = {}
    has_processor = (folder / "processor_config.json").is_file()
    reference = torch.load(folder / REFERENCE) if (folder / REFERENCE).is_file() else None
    if reference is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        found["class"] = type(AutoModel.from_config(config, trust_remote_code=True)).__name__
        return found
    if has_processor:
        found |= open_processor(folder, reference)
    if (folder / "config.json").is_file():
        found |= open_model(folder, reference)
        if has_processor:
            found |= open_everything(folder, reference)
    return found


def main(folders: list[str]) -> None:
    sys.meta_path.insert(0, NoHfMoe())
    findings = {}
    for folder in folders:
        try:
            findings[folder] = inspect(Path(folder))
        except (OSError, ValueError) as error:
            findings[folder] = {"error": f"{type(error).__name__}: {error}"}
    assert not any(name.partition(".")[0] == "hf_moe" for name in sys.modules)
    print(json.dumps(findings))


if __name__ == "__main__":
    main(sys.argv[1:])
