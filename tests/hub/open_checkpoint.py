"""Opens a checkpoint where `hf_moe` cannot be imported and compares it with what was recorded when it was saved.

Run as a script, `open_checkpoint.py FOLDER`, in any environment that has torch, transformers and pillow. FOLDER holds
the checkpoint in `checkpoint/` and the recording in `reference.pt`. The last line of the output is a JSON object of
findings.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class NoHfMoe(importlib.abc.MetaPathFinder):
    """Makes `import hf_moe` fail, installed or not."""

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "hf_moe":
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


def largest_difference(model, reference):
    import torch

    with torch.no_grad():
        logits = model.eval()(**reference["inputs"]).logits
    return (logits - reference["logits"]).abs().max().item()


def open_checkpoint(folder: Path) -> dict:
    """Load `folder/checkpoint` in every way, save it again from the remote class, load that, and return findings."""
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

    checkpoint, again = folder / "checkpoint", folder / "saved_again"
    reference = torch.load(folder / "reference.pt")
    found = {"config": type(AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)).__name__}
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(checkpoint, trust_remote_code=True)
        found[auto_class.__name__] = largest_difference(model, reference)
    found["class"] = type(model).__name__
    ids = model.generate(**reference["inputs"], max_new_tokens=5, do_sample=False)
    found["ids_equal"] = ids.tolist() == reference["ids"].tolist()

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    inputs = processor(images=[image], text=[reference["text"]], return_tensors="pt")
    found["inputs_equal"] = all(torch.equal(inputs[name], value) for name, value in reference["inputs"].items())

    model.save_pretrained(again)
    processor.save_pretrained(again)
    reloaded = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
    found["saved_again"] = largest_difference(reloaded, reference)
    found["saved_again_processor"] = type(AutoProcessor.from_pretrained(again, trust_remote_code=True)).__name__

    answer = pipeline("image-text-to-text", model=str(again), trust_remote_code=True)(
        images=image, text=reference["text"], generate_kwargs={"max_new_tokens": 5, "do_sample": False}
    )
    found["pipeline"] = answer[0]["generated_text"]
    try:
        AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False)
    except ValueError as error:
        found["untrusted"] = str(error)
    found["hf_moe_modules"] = [name for name in sys.modules if name.partition(".")[0] == "hf_moe"]
    return found


if __name__ == "__main__":
    sys.meta_path.insert(0, NoHfMoe())
    print(json.dumps(open_checkpoint(Path(sys.argv[1]))))
