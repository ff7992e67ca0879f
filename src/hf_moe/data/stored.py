"""Images, videos and sounds as `datasets` keeps them: paths, or bytes."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Image, List, Value
from PIL import Image as PILImage

from ..modeling.image_loading import decode_image, read_image
from .sounds import as_wav, read_sound
from .videos import read_video


URL = re.compile("data:|https?://|file://", re.IGNORECASE)
FILE_FEATURES = {"path": Value("string"), "bytes": Value("binary")}
MEDIA_FEATURES = {
    "images": List(Image()),
    "videos": List({**FILE_FEATURES, "frames": List(FILE_FEATURES), "fps": Value("float64")}),
    "audios": List({**FILE_FEATURES, "sampling_rate": Value("int64")}),
}


def store_image(source: Any, folder: Path) -> Any:
    """Return an image as `datasets` keeps it: a path, or bytes."""
    if isinstance(source, dict) and source.get("bytes") is None and source.get("path") is not None:
        source = source["path"]
    if isinstance(source, str | Path) and not URL.match(str(source)):
        path = folder / source
        if os.path.isfile(path):  # of text of any length
            return str(path)
        try:
            name, content = read_image({"base64": str(source)})
            decode_image(name, content)  # the name of a file that is missing may be base64 as well
        except ValueError:
            raise FileNotFoundError(f"has no image at {str(path):.200}.") from None
        return {"bytes": content, "path": None}
    try:
        name, content = read_image(source)
        if isinstance(content, torch.Tensor):
            return decode_image(name, content)
    except ValueError as error:
        raise ValueError(f"has no readable image: {error}.") from error
    if not isinstance(content, bytes):
        return content
    return {"bytes": content, "path": source.get("path") if isinstance(source, dict) else None}


def _store(kind: str, source: Any, folder: Path) -> dict[str, Any]:
    """Return a video or a sound as a path, the bytes of a file or, of a video, its frames; and its rate.

    Samples become a WAV file of floats. The source is in any form of [`open_video`] or [`open_sound`], its paths
    relative to `folder`.
    """
    noun, rate_name = ("video", "fps") if kind == "video" else ("sound", "sampling_rate")
    read: Callable[[Any], tuple[str, Any, Any]] = read_video if kind == "video" else read_sound
    record = _record(source, kind)
    key, value = _only(record, kind)
    kept = dict.fromkeys(MEDIA_FEATURES[f"{kind}s"].feature) | {rate_name: record.get(rate_name)}
    path = _path(value, folder, noun) if key != "base64" else None
    if path is not None:
        return {**kept, "path": path}
    is_frames = isinstance(value, list | tuple) and not (value and isinstance(value[0], list | tuple))
    if kind == "video" and is_frames:
        return {**kept, "frames": [_encoded(store_image(frame, folder)) for frame in value]}
    try:
        _, content, rate = read(record)
        if isinstance(content, bytes):
            return {**kept, "bytes": content, "path": record.get("path") if key == "bytes" else None}
        if kind == "video":
            return {**kept, "frames": [_encoded(decode_image(*read_image(frame))) for frame in content], "fps": rate}
        if rate is None:
            raise ValueError("its rate is unknown: write {'array': ..., 'sampling_rate': 16000}")
        return {**kept, "bytes": as_wav(content, rate), "sampling_rate": None}
    except ValueError as error:
        raise ValueError(f"has no readable {noun}: {error}.") from error


STORE: dict[str, Callable] = {"image": store_image, **{kind: partial(_store, kind) for kind in ("video", "audio")}}


def _record(source: Any, key: str) -> dict[str, Any]:
    """Return what a row holds as a record without what says nothing."""
    record = dict(source) if isinstance(source, Mapping) else {key: source}
    record = {name: value for name, value in record.items() if value is not None}
    inner = record.pop(key) if isinstance(record.get(key), Mapping) else {}
    return record | {name: value for name, value in inner.items() if value is not None}


def _only(record: dict[str, Any], noun: str) -> tuple[str, Any]:
    """Return the key and the value of what a record holds."""
    numbers = ("fps", "sampling_rate", "path") if "bytes" in record or "array" in record else ("fps", "sampling_rate")
    found = [(name, value) for name, value in record.items() if name not in numbers]
    if len(found) != 1:
        raise ValueError(f"has a {noun} with {', '.join(record) or 'nothing'}: it is under one key.")
    return found[0]


def _path(value: Any, folder: Path, noun: str) -> str | None:
    """Return the path that a value names, `None` for what is no path."""
    if not isinstance(value, str | Path) or URL.match(str(value)):
        return None
    path = folder / value
    if not os.path.exists(path):
        raise FileNotFoundError(f"has no {noun} at {str(path):.200}.")
    return str(path)


def _encoded(image: Any) -> dict[str, Any]:
    if isinstance(image, str):
        return {"path": image, "bytes": None}
    if isinstance(image, PILImage.Image):
        file = BytesIO()
        image.save(file, "PNG")
        return {"path": None, "bytes": file.getvalue()}
    return image
