"""Inputs for any checkpoint, and what it answers to them in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..modeling.vision import dummy_pixels


SCRIPT = Path(__file__).with_name("answer_alone.py")


@dataclass(frozen=True)
class Answer:
    """What a checkpoint answers.

    Attributes:
        logits (`torch.Tensor` of shape `(1, S, vocabulary)`, *optional*): `None` if the code does not run.
        dtype: of the logits when they were computed.
        wrong: the tensors that were missing, unexpected or of another shape, by kind.
        error: why there are no logits.
    """

    logits: torch.Tensor | None = None
    dtype: str = "float32"
    wrong: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


def probe_inputs(config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random text, after a random image if the model sees."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.text_config.vocab_size, (1, 64), generator=generator)
    if config.vision_config is None:
        return {"input_ids": ids}
    pixels = dummy_pixels(config, torch.device("cpu"), torch.float32)
    inputs = {name: tensor for name, tensor in pixels.items() if tensor is not None}
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator)
    image = ids.new_full((1, config.image_seq_length), config.image_token_id)
    inputs["input_ids"] = torch.cat([image, ids[ids != config.image_token_id][None]], dim=1)
    return inputs


def ask(folder: Path, inputs: dict[str, torch.Tensor], scratch: Path, installed: bool = False) -> Answer:
    """Return what a checkpoint answers in a fresh process.

    Args:
        folder: the checkpoint.
        inputs: of the model's forward.
        scratch: an existing folder for what the process writes.
        installed: run the installed classes, and not the code of the checkpoint.
    """
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, scratch / "inputs.safetensors")
    # A fault of the process itself must not leave the answer of an older one.
    answer = scratch / "answer.safetensors"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-P", str(SCRIPT), str(folder), str(scratch / "inputs.safetensors"), str(answer)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *(["--installed"] if installed else [])], env=environment, capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return Answer(error=f"the process ended with {result.returncode}: {reason}")
    found = json.loads(lines[-1])
    return Answer(**found) if "error" in found else Answer(**load_file(answer), **found)
