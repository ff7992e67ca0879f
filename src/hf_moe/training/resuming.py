"""Which checkpoint a stopped run goes on from: the newest that is whole.

A run that is killed while it saves leaves a folder with some of its files, or with part of one. Trainer would take it
for its number, and fail on it, or go on with a fresh optimizer where that file is missing.
"""

import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import get_crc32_options
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Every one is written by Trainer on one device; sharded training writes folders in place of the first.
NEEDED = ("optimizer.pt", "scheduler.pt")
SHARDED = ("global_step*", "optimizer_*")


def newest_whole_checkpoint(folder: Path, needed: Sequence[str] = ()) -> Path | None:
    """Return the newest checkpoint of a trainer that is whole, and warn of every one that is passed over.

    Args:
        folder: of the trainer.
        needed: files that each has to hold besides Trainer's own.

    Returns:
        `None` where there is none.
    """
    steps = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
    }
    for step in sorted(steps, reverse=True):
        damage = find_damage(steps[step], needed) or _wrong_step(steps[step], step)
        if damage is None:
            return steps[step]
        logger.warning("Passing over %s, which is not whole: %s.", steps[step], damage)
    if steps:
        logger.warning("No checkpoint in %s is whole: starting from the beginning.", folder)
    return None


def find_damage(folder: Path, needed: Sequence[str] = ()) -> str | None:
    """Return what is missing or damaged in a checkpoint of a trainer; `None` where it is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    names = {path.name for path in files}
    # Folders alone: a file of code that goes with a checkpoint may be called so too.
    sharded = any(path.is_dir() for pattern in SHARDED for path in folder.glob(pattern))
    for name in (STATE_FILE, *(() if sharded else NEEDED), *needed):
        if name not in names:
            return f"it has no {name}"
    if not sharded and not names & set(WEIGHTS):
        return "it has no weights"
    if not sharded and not any(name.startswith("rng_state") for name in names):
        return "it has no rng_state"
    for path in files:
        if (damage := _file_damage(path)) is not None:
            return f"{path.relative_to(folder)} {damage}"
    return None


def weights_damage(folder: Path) -> str | None:
    """Return what is missing or damaged in a folder of weights; `None` where it is whole."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if not {path.name for path in files} & set(WEIGHTS):
        return "it has no weights"
    return next((f"{path.name} {damage}" for path in files if (damage := _file_damage(path)) is not None), None)


def _file_damage(path: Path) -> str | None:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "is cut off or no JSON"
        if path.name.endswith(".safetensors.index.json"):
            shards = set(content.get("weight_map", {}).values())
            missing = sorted(name for name in shards if not (path.parent / name).is_file())
            return f"names {missing[0]}, which is missing" if missing else None
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as weights:
                if _all_zero(weights):
                    return "holds nothing but zeros"
        except (SafetensorError, OSError) as error:
            return f"is damaged ({error})"
    elif path.suffix in (".pt", ".pth", ".bin"):
        return _archive_damage(path)
    return None


def _all_zero(weights: Any) -> bool:
    """Tell whether a file that holds tensors holds not one bit; all but the first are rarely read."""
    tensors = (weights.get_tensor(name).flatten().view(torch.uint8) for name in weights.keys())
    return bool(weights.keys()) and not any(tensor.any() for tensor in tensors)


def _archive_damage(path: Path) -> str | None:
    # torch.save writes archives, whose list of contents comes last, with a checksum of each.
    if not zipfile.is_zipfile(path):
        return "is cut off or overwritten"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if get_crc32_options() else None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"is damaged ({error})"
    return None if damaged is None else f"is damaged (its part {damaged} is not what was written)"


def _wrong_step(folder: Path, step: int) -> str | None:
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    found = state.get("global_step") if isinstance(state, dict) else None
    return None if found == step else f"its {STATE_FILE} is of step {found}"
