"""The pictures of rows: how they are opened, and what tells two of them apart."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fsspec
from datasets import Audio, Dataset, Image, IterableDataset, List, Video
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image as PILImage

from ..modeling.image_loading import decode_image, read_encoded, read_image
from .rows import MEDIA_COLUMNS


def read_row_image(image: Any) -> tuple[str, Any]:
    """Return the name and the content of a row's image, see [`read_image`]."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
    if isinstance(path, str) and "://" in path and path.partition(":")[0] not in ("http", "https", "file"):
        # A record of a stream points into a repository or an archive, which `datasets` can read.
        try:
            return f"the file {path}", Image().decode_example({"path": path, "bytes": None})
        except Exception as error:  # of any file system
            raise ValueError(f"the file {path} cannot be read as a picture: {error}") from error
    return read_image(image)


def read_row_file(source: Any, noun: str) -> tuple[str, bytes] | None:
    """Return the name and the bytes of a row's video or sound, see [`read_encoded`]."""
    if isinstance(source, str) and source.partition("://")[0] not in ("http", "https", "file", source):
        # A record of a stream points into a repository or an archive.
        try:
            with fsspec.open(source, "rb") as file:
                return f"the file {source}", file.read()
        except Exception as error:  # of any file system
            raise ValueError(f"the file {source} cannot be read: {error}") from error
    return read_encoded(source, noun)


def one_source(record: Mapping[str, Any], sources: tuple[str, ...], noun: str) -> tuple[Any, str]:
    """Return the video or sound that a record holds, and how errors call it; an empty name where only it knows.

    Exactly one of the keys `sources` may be given; a `path` beside `bytes` or an `array` is only a name.
    """
    given = {key: record[key] for key in sources if record.get(key) is not None}
    path = given.pop("path", None) if "bytes" in given or "array" in given else None
    if len(given) != 1:
        found = f"{noun}s under {' and '.join(given)}" if given else f"no {noun} under its keys {list(record)}"
        raise ValueError(f"a record holds {found}: give exactly one of {', '.join(sources)}")
    ((key, value),) = given.items()
    return f"data:;base64,{value}" if key == "base64" else value, f"the file {path}" if path else ""


def open_row_images(images: list[Any]) -> list[PILImage.Image]:
    """Return the images of a row as RGB; an error names the first that cannot be opened."""
    opened = []
    for position, image in enumerate(images):
        with readable("image", position):
            opened.append(decode_image(*read_row_image(image)))
    return opened


@contextmanager
def readable(noun: str, position: int) -> Iterator[None]:
    """Name an image, a video or a sound of a row in the errors of what reads it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"has no readable {noun} {position}: {error}.") from error


def content_key(name: str, content: Any) -> bytes:
    """Return a key that only this content has: a digest of the encoded picture, else of its pixels."""
    if isinstance(content, bytes):
        return hashlib.sha256(b"encoded" + content).digest()
    return pixel_key(decode_image(name, content))


def pixel_key(picture: PILImage.Image) -> bytes:
    """Return a digest of an RGB picture."""
    return hashlib.sha256(f"pixels {picture.size}".encode() + picture.tobytes()).digest()


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows with images, videos and sounds as paths or bytes, so that reading a row decodes nothing."""
    for name in sorted(set(MEDIA_COLUMNS) & set(rows.features or ())):
        feature = _undecoded_feature(rows.features[name])
        if feature != rows.features[name]:
            hidden = are_progress_bars_disabled()
            disable_progress_bars()  # casting takes no time
            rows = rows.cast_column(name, feature)
            if not hidden:
                enable_progress_bars()
    return rows


def _undecoded_feature(feature: Any) -> Any:
    if isinstance(feature, List):
        return List(_undecoded_feature(feature.feature), length=feature.length)
    return replace(feature, decode=False) if isinstance(feature, Image | Audio | Video) else feature
