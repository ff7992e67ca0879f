"""Asks hosts with MoE layers through their own processors, about pictures, videos and sounds.

Run as a program, `FILE FOLDER ...`, where `hf_moe` cannot be imported. It writes a JSON object to the
file: folder to what the model answers and the classes that answer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

from helpers.hub.open_checkpoint import NoHfMoe


RATE = 16000
EXACT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def made(kind: str):
    """Return a picture, a video or a sound, the same in every process."""
    rng = np.random.default_rng(0)
    if kind == "audio":
        return rng.standard_normal(6000).astype(np.float32) / 9
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    return pictures[0] if kind == "image" else np.stack([np.asarray(picture) for picture in pictures])


def messages_of(kinds: tuple[str, ...]) -> list[dict]:
    content = [{"type": kind, kind: made(kind)} for kind in kinds]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}]


def inputs_of(processor, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the inputs that a processor makes of a message, by its chat template."""
    text = processor.apply_chat_template(messages_of(kinds), add_generation_prompt=True)
    media = {"image": "images", "video": "videos", "audio": "audio"}
    given = {media[kind]: [made(kind)] for kind in kinds}
    rate = {"sampling_rate": RATE} if "audio" in kinds else {}
    return processor(text=[text], return_tensors="pt", **given, **rate)


def ask(folder: Path) -> dict:
    kinds = tuple(json.loads((folder / "kinds.json").read_text()))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = inputs_of(processor, kinds)
    with torch.no_grad():
        logits = model(**inputs).logits
    found = {
        "processor": type(processor).__name__,
        "module": type(model).__module__,
        "logits": logits[0, -1].tolist(),
        "ids": model.generate(**inputs, **EXACT).tolist(),
    }
    if "image" in kinds:
        told = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
        answer = told(text=messages_of(("image",)), generation_config=None, return_full_text=False, **EXACT)
        found["told"] = answer[0]["generated_text"]
    return found


def main(file: str, folders: list[str]) -> None:
    sys.meta_path.insert(0, NoHfMoe())
    Path(file).write_text(json.dumps({Path(folder).name: ask(Path(folder)) for folder in folders}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
