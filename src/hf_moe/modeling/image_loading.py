"""One function opens a picture, in whatever form it comes, as the RGB image that every tower sees."""

import base64
import os
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


# Under one of these keys a content part of a message, or a record of `datasets`, holds a picture.
IMAGE_SOURCES = ("image", "url", "path", "base64", "bytes", "image_url")
CHANNELS = (1, 3, 4)
DOWNLOAD_SECONDS = 60
FORMS = (
    "a path, a URL, base64 text, bytes, an opened file, a PIL image, an array, a tensor, or a record of one of them"
)


def open_image(image: Any) -> Image.Image:
    """Return a picture as an upright RGB image.

    Transparency is composed on white, the EXIF orientation is applied, 16-bit levels are scaled to 8 bits, and of an
    animation the first frame is taken (of a PIL image the current one). Integers of other types and floats are levels
    up to 255, unless they fit the range that has no other meaning: floats up to 1 are shares of white, integers above
    255 are 16-bit levels. An array whose channels could be first or last has them last, a tensor has them first.

    Args:
        image: a path, an http(s), file or data URL, base64 text, bytes, an opened file, a PIL image, an array or a
            tensor with one, three or four channels (or none, for grey), or a dict that holds one of them under
            `image`, `url`, `path`, `base64`, `bytes` or `image_url`; beside `bytes`, a `path` is only a name.

    Raises:
        ValueError: naming the picture, if it is missing, damaged, empty or of another form.
    """
    return decode_image(*read_image(image))


def read_image(image: Any) -> tuple[str, Any]:
    """Return how errors call a picture, and its content: encoded bytes, a PIL image, an array or a tensor."""
    if isinstance(image, dict):
        return _read_record(image)
    encoded = read_encoded(image, "picture")
    if encoded is not None:
        return encoded
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "")
        return f"the file {name}" if name else f"the image of mode {image.mode}", image
    if isinstance(image, torch.Tensor):
        return f"the tensor of shape {tuple(image.shape)}", image
    if hasattr(image, "__array__"):
        array = np.asarray(image)
        return f"the array of shape {array.shape}", array
    raise ValueError(f"{_short(image)} ({type(image).__name__}) is not a picture; a picture is {FORMS}")


def read_encoded(source: Any, noun: str) -> tuple[str, bytes] | None:
    """Return how errors call an encoded picture, video or sound, the `noun`, and its bytes; `None` if not encoded."""
    if isinstance(source, str):
        return _read_text(source, noun)
    if isinstance(source, os.PathLike):
        return _read_file(os.fsdecode(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the {noun} of {len(source)} bytes", bytes(source)
    is_opened = hasattr(source, "read") and not isinstance(source, Image.Image)
    return _read_opened(source) if is_opened else None


def decode_image(name: str, content: Any) -> Image.Image:
    """Return what [`read_image`] found as an RGB image."""
    try:
        if isinstance(content, torch.Tensor):
            return _array_as_rgb(content.detach().cpu(), prefer_first=True)
        if isinstance(content, np.ndarray):
            return _array_as_rgb(content, prefer_first=False)
        if isinstance(content, Image.Image):
            return _picture_as_rgb(content)
        if not content:
            raise ValueError("it is empty")
        with Image.open(BytesIO(content)) as picture:
            return _picture_as_rgb(picture)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read as a picture: its format is unknown to Pillow") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ValueError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from error


def open_image_lists(images: Any) -> list:
    """Return pictures opened: a flat list, or a list of rows where a list of lists (or of batches) is given."""
    images = images if is_list(images) else [images]
    if len(images) == 1 and _is_batch(images[0]):
        images = list(images[0])
    if not any(is_list(item) or _is_batch(item) for item in images):
        return [_open_at(image, f"Image {place}") for place, image in enumerate(images)]
    rows: list[list[Image.Image]] = []
    for row, items in enumerate(images):
        if items is not None and not is_list(items) and not _is_batch(items):
            raise ValueError(
                f"Row {row} of the images is {_short(items)} where other rows are lists: give a list of images per "
                "row, or one flat list."
            )
        items = [] if items is None else items
        rows.append([_open_at(image, f"Row {row}, image {place}") for place, image in enumerate(items)])
    return rows


def is_list(value: Any) -> bool:
    """Tell whether a value holds several: a list, a tuple, a column of `datasets`; text and bytes are one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 4


def _open_at(image: Any, place: str) -> Image.Image:
    try:
        return open_image(image)
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _read_record(record: dict) -> tuple[str, Any]:
    given = {key: record[key] for key in IMAGE_SOURCES if record.get(key) is not None}
    if "bytes" in given:
        content = given["bytes"]
        if not isinstance(content, bytes | bytearray | memoryview):
            raise ValueError(f"the bytes of a picture are {_short(content)} ({type(content).__name__})")
        return f"the file {given['path']}" if "path" in given else f"the picture of {len(content)} bytes", bytes(
            content
        )
    if len(given) != 1:
        found = f"pictures under {' and '.join(given)}" if given else f"no picture under its keys {list(record)}"
        raise ValueError(f"a record holds {found}: give exactly one of {', '.join(IMAGE_SOURCES)}")
    (key, value), *_ = given.items()
    if key == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        content = _decoded_base64(value.encode(errors="replace"))
        if not content:
            raise ValueError(f"the base64 of a picture is {_short(value)}, which is none")
        return f"the base64 text {_short(value[:40])}", content
    return read_image(value)


def _read_text(text: str, noun: str) -> tuple[str, bytes]:
    if not text:
        raise ValueError(f"an empty text names no {noun}")
    scheme = text[:8].partition(":")[0].lower()
    if scheme in ("http", "https") and "://" in text[:8]:
        return text, _download(text)
    if scheme == "data":
        header, _, payload = text.partition(",")
        name = f"the data URL {_short(text[:40])}"
        if header.endswith(";base64"):
            content = _decoded_base64(unquote_to_bytes(payload))
            if content is None:
                raise ValueError(f"{name} is not base64 after its comma")
            return name, content
        return name, unquote_to_bytes(payload)
    if scheme == "file" and text[5:7] == "//":
        return _read_file(url2pathname(urlsplit(text).path))
    if not os.path.exists(text):
        content = _decoded_base64(text.encode(errors="replace"))
        if content:
            return f"the text {_short(text)}, which names no file and was taken as base64,", content
    return _read_file(text)


def _decoded_base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError:
        return None


def _download(url: str) -> bytes:
    try:
        # Many servers refuse the name that Python gives itself.
        request = Request(url, headers={"User-Agent": "Mozilla/5.0 (hf_moe)"})
        with urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from error


def _read_file(path: str) -> tuple[str, bytes]:
    try:
        return f"the file {path}", Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {_short(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the file {_short(path)} cannot be read: {reason}") from error


def _read_opened(file: Any) -> tuple[str, bytes]:
    name = f"the opened file {getattr(file, 'name', type(file).__name__)}"
    try:
        if not hasattr(file, "seekable") or file.seekable():
            # Every epoch reads it again.
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise ValueError(f"{name} gives {type(content).__name__}: open it with mode 'rb'")
    return name, content


def _picture_as_rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"it has no pixels, its size is {picture.width} x {picture.height}")
    picture = ImageOps.exif_transpose(picture)
    transparency = picture.info.get("transparency")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        values = np.asarray(picture)
        levels = _levels(values)
        levels = levels if transparency is None else np.where(values == transparency, np.uint8(255), levels)
        return Image.fromarray(levels).convert("RGB")
    if picture.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    palette = picture.palette.mode if picture.mode == "P" and picture.palette is not None else ""
    if picture.getbands()[-1] in ("A", "a") or transparency is not None or palette.endswith("A"):
        picture = picture.convert("LA") if picture.mode == "La" else picture
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return picture.convert("RGB")


def _array_as_rgb(array: Any, prefer_first: bool) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError("a picture is (height, width), (height, width, channels) or (channels, height, width)")
    first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
    if not first and not last:
        raise ValueError("neither its first nor its last dimension is of 1, 3 or 4 channels")
    if first and (prefer_first or not last):
        array = np.moveaxis(array, 0, -1)
    levels = np.ascontiguousarray(_levels(array))  # (H, W, C)
    return _picture_as_rgb(Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels))


def _levels(values: np.ndarray) -> np.ndarray:
    """Return a picture's numbers as levels from 0 to 255."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b" or (kind == "u" and size == 1):
        return values.astype(np.uint8) * (255 if kind == "b" else 1)
    if kind not in "uif":
        raise ValueError(f"its numbers are of type {values.dtype}")
    low, high = values.min().item(), values.max().item()
    ranges = (65535,) if kind == "u" and size == 2 else (1, 255) if kind == "f" else (255, 65535)
    white = next((white for white in ranges if high <= white), None)
    if white is None or low < 0:
        raise ValueError(
            f"its numbers of type {values.dtype} go from {low} to {high}: floats go from 0 to 1 or 255, integers from "
            "0 to 255 or 65535"
        )
    return (values.astype(np.float32) * (255 / white)).round().astype(np.uint8)


__all__ = ["IMAGE_SOURCES", "decode_image", "is_list", "open_image", "open_image_lists", "read_encoded", "read_image"]
