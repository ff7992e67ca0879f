"""Keeps checkpoints of tiny hosts for other releases of Transformers, config and weights, with what they answered.

    cd tests && python -m helpers.hosts.keep_hosts

Run with the lowest and the newest release, before a version is released. It writes `released/transformers_<release>/`,
over what was there.
"""

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.hosts.catalogue import HOSTS, MODALITY_GATES, drift_apart, in_place


RELEASED = Path(__file__).parents[2] / "hosts" / "released"
KEPT = ("qwen2_5_vl", "gemma3", "qwen3_vl_moe")
ANSWER = "answer.safetensors"


def keep(name: str, folder: Path) -> None:
    adopted = HOSTS[name].adopted
    model = drift_apart(in_place(name, {} if adopted else {"num_experts": 4, "router": MODALITY_GATES}))
    model.save_pretrained(folder)
    # What is kept is what another release reads; the code is the library's own.
    for path in folder.glob("*.py"):
        path.unlink()
    save_file(answer(model, HOSTS[name].inputs()), folder / ANSWER)


def answer(model, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    return {"logits": logits.contiguous(), **{f"inputs.{key}": value for key, value in inputs.items()}}


def kept_answer(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of a kept checkpoint, and its logits at the last token."""
    tensors = load_file(folder / ANSWER)
    logits = tensors.pop("logits")
    return {key.removeprefix("inputs."): value for key, value in tensors.items()}, logits


def main() -> None:
    root = RELEASED / f"transformers_{transformers.__version__}"
    shutil.rmtree(root, ignore_errors=True)
    for name in KEPT:
        keep(name, root / name)


if __name__ == "__main__":
    main()
