"""Features of a frozen vision tower, computed once per image and kept on disk."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration, HfMoeModel
from ..modeling.processing_hf_moe import HfMoeProcessor
from ..modeling.vision import tower_features
from .rows import describe_row, row_images, undecoded
from .tokenisation import process_images, takes_packed_patches


logger = logging.getLogger(__name__)


class FeatureCache:
    """Tower features by image key.

    Args:
        keys: one key per image.
        features (`torch.Tensor` of shape `(N, P, C)`): their features, in the same order.
        key: the column that names a row's image, or lists the names of its images.
    """

    def __init__(self, keys: list[str], features: torch.Tensor, key: str = "image_id"):
        self.key = key
        self.features = features
        self.index = {name: position for position, name in enumerate(keys)}

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def build(
        cls,
        model: HfMoeForConditionalGeneration | HfMoeModel,
        processor: HfMoeProcessor,
        rows: Dataset | IterableDataset | list[dict[str, Any]],
        key: str = "image_id",
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float16,
    ) -> "FeatureCache":
        """Run the model's tower once per distinct image of `rows`, or read what an earlier run has left.

        The file is named after the tower's weights, the image processor's settings and the images, so it is read again
        only where all are the same.

        Args:
            cache_dir: folder of the file; by default `hf_moe/features` in the Hugging Face cache.
            dtype: in which the features are kept.

        Raises:
            ValueError: if the tower is trainable, takes packed patches, or its features do not fit `dtype`; if
                rows lack the key.
        """
        base: HfMoeModel = model.base_model
        tower = base.vision_tower
        if tower is None:
            raise ValueError("The model has no vision tower, so there are no features to compute.")
        trainable = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"Features can be kept only of a frozen tower; {len(trainable)} of its parameters are trainable, such "
                f"as {trainable[0]}: call vision_tower.requires_grad_(False), or train on pixel_values."
            )
        if takes_packed_patches(processor):
            raise ValueError("This tower's images differ in their number of patches: train on pixel_values.")
        images = _distinct_images(rows, key)
        config = base.config
        settings = [config.vision_feature_layer, config.vision_prefix_tokens, str(dtype)]
        settings.append(processor.image_processor.to_json_string())
        folder = Path(HF_HOME, "hf_moe", "features") if cache_dir is None else Path(cache_dir)
        path = folder / f"{_digest(tower, settings, images)}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    return cls(json.loads(file.metadata()["keys"]), file.get_tensor("features"), key)
            except (SafetensorError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s): computing the features again.", path, error)

        features = _compute(tower, config, processor, list(images.values()), batch_size, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(descriptor)
        save_file({"features": features}, temporary, metadata={"keys": json.dumps(list(images))})
        os.replace(temporary, path)
        return cls(list(images), features, key)

    def row_keys(self, row: dict[str, Any]) -> list[str]:
        """Return the keys of a row's images.

        Raises:
            ValueError: if the row has images but no key.
        """
        return _row_keys(row, self.key)

    def lookup(self, keys: list[str]) -> torch.Tensor:
        """Return the features (N, P, C) of N images.

        Raises:
            ValueError: naming the first key that was not computed.
        """
        missing = next((name for name in keys if name not in self.index), None)
        if missing is not None:
            raise ValueError(f"The feature cache of {len(self)} images lacks {missing!r}: build it from all rows.")
        return self.features[[self.index[name] for name in keys]]


def _row_keys(row: dict[str, Any], key: str) -> list[str]:
    count = len(row_images(row))
    if not count:
        return []
    if row.get(key) is None:
        raise ValueError(
            f"has images but no {key!r}, by which cached features are found; it has {', '.join(row)}. "
            "Trainer drops columns it does not know: set remove_unused_columns=False."
        )
    names = row[key] if isinstance(row[key], list) else [row[key]]
    if len(names) != count:
        raise ValueError(f"has {count} images, but its {key!r} names {len(names)}: {names!r}.")
    return [str(name) for name in names]


def _distinct_images(rows: Iterable, key: str) -> dict[str, Any]:
    """Return the undecoded images by key."""
    if isinstance(rows, Dataset | IterableDataset):
        names = [name for name in ("images", "image", key) if name in (rows.column_names or ())]
        rows = undecoded(rows).select_columns(names)
    images: dict[str, Any] = {}
    for index, row in enumerate(rows):
        try:
            names = _row_keys(row, key)
        except ValueError as error:
            raise ValueError(f"{describe_row(row, index, 'dataset')} {error}") from error
        for name, image in zip(names, row_images(row), strict=True):
            images.setdefault(name, image)
    return images


def _digest(tower: PreTrainedModel, settings: list, images: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, image in images.items():
        digest.update(name.encode())
        if not isinstance(image, dict):
            digest.update(image.tobytes())
        elif image["bytes"] is not None:
            digest.update(image["bytes"])
        else:
            status = os.stat(image["path"])
            digest.update(f"{image['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _compute(
    tower: PreTrainedModel,
    config: Any,
    processor: HfMoeProcessor,
    images: list[Any],
    batch_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    was_training = tower.training
    tower.eval()
    parts = []
    with tqdm(total=len(images), desc="Image features", unit="image") as progress:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = process_images(batch, processor)["pixel_values"].to(tower.device, tower.dtype)
            parts.append(tower_features(tower, config, pixels).to("cpu", dtype))
            progress.update(len(batch))
    tower.train(was_training)
    features = torch.cat(parts)  # (N, P, C)
    if not features.isfinite().all():
        raise ValueError(f"The tower's features do not fit {dtype}: pass dtype=torch.bfloat16 or torch.float32.")
    return features
