"""Images, videos and sounds as `datasets` keeps them: paths, or bytes."""

import os
import re
from collections.abc import Mapping
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
        content = _from_base64(str(source))
        if content is None:
            raise FileNotFoundError(f"has no image at {str(path):.200}.")
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


def _from_base64(text: str) -> bytes | None:
    try:
        name, content = read_image({"base64": text})
        decode_image(name, content)  # the name of a file that is missing may be base64 as well
    except ValueError:
        return None
    return content


def store_video(source: Any, folder: Path) -> dict[str, Any]:
    """Return a video as a path, the bytes of a file, or its frames, and their rate where the row says it.

    Args:
        source (`Any`): in any form of [`open_video`]; paths are relative to `folder`.

    Raises:
        FileNotFoundError: if it, or a frame of it, is not there.
        ValueError: if it is of another form.
    """
    record = _record(source, "video")
    key, value = _only(record, "video")
    kept: dict[str, Any] = {"path": None, "bytes": None, "frames": None, "fps": record.get("fps")}
    path = _path(value, folder, "video") if key != "base64" else None
    if path is not None:
        return {**kept, "path": path}
    if isinstance(value, list | tuple) and not (value and isinstance(value[0], list | tuple)):
        return {**kept, "frames": [_encoded(store_image(frame, folder)) for frame in value]}
    try:
        _, content, fps = read_video(record)
        if isinstance(content, bytes):
            return {**kept, "bytes": content, "path": record.get("path") if key == "bytes" else None}
        return {**kept, "frames": [_encoded(decode_image(*read_image(frame))) for frame in content], "fps": fps}
    except ValueError as error:
        raise ValueError(f"has no readable video: {error}.") from error


def store_sound(source: Any, folder: Path) -> dict[str, Any]:
    """Return a sound as a path or the bytes of a file; samples become a WAV file of floats.

    Args:
        source (`Any`): in any form of [`open_sound`]; paths are relative to `folder`.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is of another form, or samples have no rate.
    """
    record = _record(source, "audio")
    key, value = _only(record, "audio")
    kept: dict[str, Any] = {"path": None, "bytes": None, "sampling_rate": record.get("sampling_rate")}
    path = _path(value, folder, "sound") if key != "base64" else None
    if path is not None:
        return {**kept, "path": path}
    try:
        _, content, rate = read_sound(record)
        if isinstance(content, bytes):
            return {**kept, "bytes": content, "path": record.get("path") if key == "bytes" else None}
        if rate is None:
            raise ValueError("its rate is unknown: write {'array': ..., 'sampling_rate': 16000}")
        return {**kept, "bytes": as_wav(content, rate), "sampling_rate": None}
    except ValueError as error:
        raise ValueError(f"has no readable sound: {error}.") from error


STORE = {"image": store_image, "video": store_video, "audio": store_sound}


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
