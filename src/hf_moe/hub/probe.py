"""Inputs for any checkpoint, and what it answers to them in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from ..modeling.vision import dummy_pixels
from .host_facts import host_name, modalities, placeholders


logger = logging.get_logger(__name__)

SCRIPT = Path(__file__).with_name("answer_alone.py")
# Size of a video of noise.
FRAMES, SIDE = 4, 64


@dataclass(frozen=True)
class ProbeAnswer:
    """What a checkpoint answers."""

    logits: torch.Tensor | None = None  # (1, S, vocabulary), `None` if the code does not run
    dtype: str = "float32"  # of the logits when they were computed
    wrong: dict[str, list[str]] = field(default_factory=dict)  # tensors missing, unexpected or of another shape
    error: str | None = None  # why there are no logits


def probe_inputs(config: Any, seed: int = 0, processor: Any = None) -> dict[str, torch.Tensor]:
    """Return random text, and before it noise of each kind that the model takes.

    Without the processor of a host of Transformers, or where it fails, the text stands alone.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.get_text_config(decoder=True).vocab_size, (1, 64), generator=generator)
    marks = torch.tensor([*placeholders(config).values()], dtype=ids.dtype)
    text = {"input_ids": ids[~torch.isin(ids, marks)][None]}
    taken = modalities(config)
    if taken == ("text",):
        return text
    if host_name(config) is None:
        return _with_pixels(config, text["input_ids"], generator)
    if processor is None:
        return text
    try:
        return _by_processor(processor, taken, generator)
    # A processor of any host may fail in any way.
    except Exception as error:
        logger.warning(f"{type(processor).__name__} makes no inputs of noise, so there is only text: {error}")
        return text


def probed(config: Any, inputs: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the modalities of such inputs."""
    return ("text", *(name for name, mark in placeholders(config).items() if (inputs["input_ids"] == mark).any()))


def _with_pixels(config: Any, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return inputs with an image of noise before the text, for a tower of ours."""
    pixels = dummy_pixels(config, torch.device("cpu"), torch.float32)
    inputs = {name: tensor for name, tensor in pixels.items() if tensor is not None}
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator)
    image = ids.new_full((1, config.image_seq_length), config.image_token_id)
    return {**inputs, "input_ids": torch.cat([image, ids], dim=1)}


def _by_processor(processor: Any, taken: tuple[str, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return what a host's processor makes of a picture, a video and a sound of noise."""
    frames = torch.randint(256, (FRAMES, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8).numpy()
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 1)
    noise = {
        "image": Image.fromarray(frames[0]),
        "video": frames,
        "audio": torch.rand(rate, generator=generator).numpy(),
    }
    content = [{"type": name, name: noise[name]} for name in taken if name in noise]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # The frames are given as they are: nothing says how fast they follow.
        **({"processor_kwargs": {"videos_kwargs": {"do_sample_frames": False}}} if "video" in taken else {}),
    )
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def ask(folder: Path, inputs: dict[str, torch.Tensor], scratch: Path, installed: bool = False) -> ProbeAnswer:
    """Return what a checkpoint answers to inputs of its forward, in a fresh process that writes to `scratch`.

    With `installed` the installed classes run, and not the code of the checkpoint.
    """
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, scratch / "inputs.safetensors")
    # A fault of the process itself must not leave the answer of an older one.
    answer = scratch / "answer.safetensors"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-P", str(SCRIPT), str(folder), str(scratch / "inputs.safetensors"), str(answer)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command += ["--installed"] if installed else []
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return ProbeAnswer(error=f"the process ended with {result.returncode}: {reason}")
    found = json.loads(lines[-1])
    return ProbeAnswer(**found) if "error" in found else ProbeAnswer(**load_file(answer), **found)
