"""Files of features, named after all that the features depend on."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


logger = logging.getLogger(__name__)
Features = TypeVar("Features")


def fingerprint(settings: Any, tensors: Iterable[tuple[str, torch.Tensor]], keys: Iterable[bytes]) -> str:
    """Return a digest of settings (as JSON), of named weights, and of the keys of pictures in any order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()[:32]


def read_whole(path: Path, read: Callable[[Path], Features]) -> Features | None:
    """Return what `read` makes of a file; `None` where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s is damaged (%s): computing the features again.", path, error)
        return None


def write_whole(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to a file that another process sees complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(descriptor)
    save_file(tensors, temporary)
    os.replace(temporary, path)
