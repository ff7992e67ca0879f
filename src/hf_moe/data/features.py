"""Features of a frozen vision tower, computed once per picture and kept on disk."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HOME
from PIL import Image as PILImage
from safetensors import safe_open
from tqdm.auto import tqdm

from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.hosts.composed import ComposedModel
from ..modeling.image_loading import decode_image
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.processing_hf_moe import HfMoeProcessor
from ..modeling.vision import tower_features
from .feature_files import fingerprint, read_whole, write_whole
from .host_features import HostFeatures
from .placeholders import expands_alone
from .row_images import content_key, pixel_key, read_row_image, readable, undecoded
from .rows import describe_row, row_media, row_named
from .tokenisation import gives_packed_patches, process_images


Rows: TypeAlias = Dataset | IterableDataset | list[dict[str, Any]]

# Fields of a tower's config that say nothing of its features.
NOT_THE_TOWER = {"_name_or_path", "transformers_version", "architectures", "dtype"}


class FeatureCache:
    """Tower features by picture, whatever the picture is called and however it comes.

    Args:
        positions (`dict[bytes, int]`): key of a picture, see [`content_key`], to the position of its features; a
            picture may have several.
        features (`torch.Tensor` of shape `(N, P, C)`).
    """

    def __init__(self, positions: dict[bytes, int], features: torch.Tensor):
        self.positions = positions
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def build(
        cls,
        model: HfMoeForConditionalGeneration | ComposedModel,
        processor: HfMoeProcessor,
        rows: Rows,
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float16,
    ) -> Any:
        """Run the model's tower once per distinct picture of `rows`, or read what an earlier run has left.

        For a host of Transformers these are the connector's outputs, and [`HostFeatures`] are returned. The file is
        named after the tower, the image processor's settings and what the pictures hold, so it is read again only
        where all are the same.

        Args:
            rows (`Rows`): a dataset or a list of rows.
            cache_dir (`str` or `os.PathLike`, *optional*): folder of the file; by default `hf_moe/features` in the
                Hugging Face cache.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): in which the features are kept.

        Raises:
            ValueError: if the tower is trainable, takes packed patches, or its features do not fit `dtype`; if an
                image cannot be opened, naming its row.
        """
        folder = Path(HF_HOME, "hf_moe", "features") if cache_dir is None else Path(cache_dir)
        if expands_alone(processor):
            held = undecoded(rows) if isinstance(rows, Dataset | IterableDataset) else rows
            return HostFeatures.build(model, processor, held, folder, dtype)
        base: ComposedModel = model.base_model
        _check_tower(base, processor)
        images = _distinct_images(rows)
        if not images:
            return cls({}, torch.empty(0, 0, base.config.vision_feature_size, dtype=dtype))
        path = folder / f"{_fingerprint(base, processor, dtype, images)}.safetensors"
        cache = read_whole(path, cls._read)
        if cache is None:
            cache = _compute(base, processor, images, batch_size, dtype)
            keys = torch.tensor([list(key) for key in cache.positions], dtype=torch.uint8)  # (M, 32)
            positions = torch.tensor(list(cache.positions.values()))  # (M,)
            write_whole(path, {"features": cache.features, "keys": keys, "positions": positions})
        return cache

    @classmethod
    def _read(cls, path: Path) -> "FeatureCache":
        with safe_open(path, "pt") as file:
            keys, positions = file.get_tensor("keys"), file.get_tensor("positions")
            names = (key.numpy().tobytes() for key in keys)
            return cls(dict(zip(names, positions.tolist(), strict=True)), file.get_tensor("features"))

    def lookup(self, images: list[Any]) -> torch.Tensor:
        """Return the features (N, P, C) of N images of rows; refuse one that was not computed, by name."""
        return self.features[[self._position(place, image) for place, image in enumerate(images)]]

    def _position(self, place: int, image: Any) -> int:
        with readable("image", place):
            name, content = read_row_image(image)
            position = self.positions.get(content_key(name, content))
            if position is None:
                # The same picture may have come in another form: decoded, or encoded otherwise.
                position = self.positions.get(pixel_key(decode_image(name, content)))
        if position is None:
            raise ValueError(
                f"has an image {place} that is not in the feature cache of {len(self)} pictures: {name} is new or has "
                "changed. Build the cache from all rows."
            )
        return position


def _check_tower(base: ComposedModel, processor: HfMoeProcessor) -> None:
    if base.vision_tower is None:
        raise ValueError("The model has no vision tower, so there are no features to compute.")
    trainable = [name for name, parameter in base.vision_tower.named_parameters() if parameter.requires_grad]
    if trainable:
        raise ValueError(
            f"Features can be kept only of a frozen tower; {len(trainable)} of its parameters are trainable, such "
            f"as {trainable[0]}: call vision_tower.requires_grad_(False), or train on pixel_values."
        )
    if gives_packed_patches(processor):
        raise ValueError("This tower's images differ in their number of patches: train on pixel_values.")


def _distinct_images(rows: Rows) -> dict[bytes, tuple[str, Any]]:
    """Return by its key every undecoded image, with how an error begins that names its row."""
    if isinstance(rows, Dataset | IterableDataset):
        rows = undecoded(rows)
        known = ("images", "image", "messages", "conversations", "id", "image_id")
        read = [name for name in known if name in (rows.column_names or ())]
        rows = rows.select_columns(read) if read else rows
    images: dict[bytes, tuple[str, Any]] = {}
    for index, row in enumerate(rows):
        with row_named(row, index, "dataset"):
            for place, image in enumerate(row_media(row, "image")):
                with readable("image", place):
                    key = content_key(*read_row_image(image))
                images.setdefault(key, (f"{describe_row(row, index, 'dataset')} has no readable image {place}", image))
    return images


def _fingerprint(base: ComposedModel, processor: HfMoeProcessor, dtype: torch.dtype, keys: Iterable[bytes]) -> str:
    tower, config, image_processor = base.vision_tower, base.config, processor.image_processor
    # A tower's origin and version change nothing about its features.
    described = {name: value for name, value in tower.config.to_dict().items() if name not in NOT_THE_TOWER}
    settings = {
        "tower": [type(tower).__module__, type(tower).__qualname__, described],
        "features": [config.vision_feature_layer, config.vision_prefix_tokens, str(dtype)],
        "processor": [type(image_processor).__module__, type(image_processor).__qualname__, image_processor.to_dict()],
    }
    return fingerprint(settings, tower.state_dict().items(), keys)


@torch.no_grad()
def _compute(
    base: ComposedModel,
    processor: HfMoeProcessor,
    images: dict[bytes, tuple[str, Any]],
    batch_size: int,
    dtype: torch.dtype,
) -> FeatureCache:
    tower = base.vision_tower
    parts: list[torch.Tensor] = []
    positions: dict[bytes, int] = {}
    count = 0
    remaining = iter(tqdm(images.items(), desc="Image features", unit="image"))
    while batch := list(islice(remaining, batch_size)):
        new = []
        for key, held in batch:
            picture = _unchanged(key, *held)
            positions[key] = position = positions.setdefault(pixel_key(picture), count)
            if position == count:
                new.append(picture)
                count += 1
        if new:
            pixels = process_images(new, processor)["pixel_values"].to(tower.device, tower.dtype)
            with evaluation_mode(tower):
                parts.append(tower_features(tower, base.config, pixels).to("cpu", dtype))
    features = torch.cat(parts)  # (N, P, C)
    if not features.isfinite().all():
        raise ValueError(f"The tower's features do not fit {dtype}: pass dtype=torch.bfloat16 or torch.float32.")
    return FeatureCache(positions, features)


def _unchanged(key: bytes, where: str, image: Any) -> PILImage.Image:
    """Return the picture of a key, opened."""
    try:
        name, content = read_row_image(image)
        if content_key(name, content) != key:
            raise ValueError(f"{name} has changed since its key was taken; leave the pictures alone meanwhile")
        return decode_image(name, content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
