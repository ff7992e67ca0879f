"""One function opens a video, in whatever form it comes, as the RGB frames that a video processor takes."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from transformers.video_utils import VideoMetadata, load_video

from ..modeling.image_loading import decode_image
from .row_images import one_source, read_row_file, read_row_image


# Under one of these keys a record holds a video; `fps` is a number beside it.
VIDEO_SOURCES = ("video", "frames", "array", "url", "path", "base64", "bytes")
# The backends of Transformers' `load_video`, and the modules that they need.
DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "cv2"}
# Options that a video processor uses up before it calls its `sample_frames`.
NOT_SAMPLING = {"input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata"}
VIDEO_FORMS = (
    "a folder of frames, a list of images, an array of four dimensions, a file (a path, a URL, bytes), an animation, "
    "or a record of one of them"
)


def open_video(video: Any, video_processor: Any = None) -> tuple[np.ndarray, VideoMetadata]:
    """Return the frames of a video (T, H, W, 3), of which the video processor wants to see these, and what is known of
    their times.

    Frames without a rate are taken as they are. Where the rate is known, the video processor picks among them, if its
    `do_sample_frames` says so.

    Args:
        video (`Any`): a folder of frames, a list of images in any form of [`open_image`], an array or a tensor (T, H,
            W, C) or (T, C, H, W), a file, an animation of Pillow, a decoder of torchcodec, or a dict that holds one of
            them under `video`, `frames`, `array`, `path`, `base64` or `bytes`, and `fps` beside it.
        video_processor (`Any`, *optional*): the host's.

    Raises:
        ValueError: naming the video, if it is missing, damaged, empty or of another form, its frames differ in size,
            or no decoder of such files is installed.
    """
    name, content, fps = read_video(video)
    sample = _sampling(video_processor)
    try:
        if isinstance(content, Path | bytes):
            frames, metadata = _decode(content, sample)
        else:
            seen = {"duration": len(content) / fps if fps else None, "frames_indices": list(range(len(content)))}
            metadata = VideoMetadata(total_num_frames=len(content), fps=fps, **seen)
            if sample is not None and fps is not None:
                metadata.frames_indices = [int(index) for index in sample(metadata=metadata)]
            frames = _stack([content[index] for index in metadata.frames_indices or []])
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a video: {error}") from error
    metadata.height, metadata.width = frames.shape[1:3]
    return frames, metadata


def read_video(video: Any) -> tuple[str, Any, float | None]:
    """Return how errors call a video, its content (a sequence of frames, or a file's path or bytes), and its rate."""
    if isinstance(video, Mapping):
        return _read_record(video)
    if isinstance(video, list | tuple):
        if not len(video):
            raise ValueError("an empty list of frames is no video")
        if isinstance(video[0], list | tuple):  # of numbers, as `datasets` gives an array
            try:
                array = np.asarray(video)
            except ValueError as error:
                raise ValueError(f"lists of unequal lengths are no array of frames ({error})") from error
            return read_video(array)
        return f"the list of {len(video)} frames", video, None
    if getattr(video, "is_animated", False):
        return "the animation", *_animation(video)
    if isinstance(video, np.ndarray | torch.Tensor):
        if video.ndim != 4:
            raise ValueError(f"an array of shape {tuple(video.shape)} is no video, which has four dimensions")
        return f"the array of shape {tuple(video.shape)}", video, None
    if hasattr(video, "get_frames_at") and hasattr(video, "metadata"):  # a decoder of torchcodec, as `datasets` gives
        return "the decoder", video, video.metadata.average_fps
    if isinstance(video, str | os.PathLike) and os.path.isdir(video):
        return f"the folder {os.fspath(video)}", frame_files(Path(video)), None
    if isinstance(video, str | os.PathLike) and os.path.isfile(video):
        return f"the file {os.fspath(video)}", *_encoded(Path(video))
    encoded = read_row_file(video, "video")
    if encoded is None:
        raise ValueError(f"{video!r:.100} ({type(video).__name__}) is not a video; a video is {VIDEO_FORMS}")
    return encoded[0], *_encoded(encoded[1])


def frame_files(folder: Path) -> list[Path]:
    """Return the pictures in a folder, in the order of the numbers in their names."""
    known = Image.registered_extensions()
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in known]
    if not files:
        raise ValueError(f"the folder {folder} holds no pictures, which would be the frames of a video")
    return sorted(files, key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", file.name)])


def _read_record(record: Mapping[str, Any]) -> tuple[str, Any, float | None]:
    value, file = one_source(record, VIDEO_SOURCES, "video")
    name, content, fps = read_video(value)
    name = file or name
    rate = record.get("fps")
    if rate is None:
        return name, content, fps
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise ValueError(f"{name} has fps={rate!r}: it is the number of frames per second, above 0")
    if isinstance(content, Path | bytes):
        raise ValueError(f"{name} has fps={rate!r}, which its file knows itself: leave it out")
    return name, content, float(rate)


def _encoded(content: Path | bytes) -> tuple[Any, float | None]:
    """Return the frames of an animation that Pillow reads, else what a decoder opens."""
    try:
        picture = Image.open(content if isinstance(content, Path) else BytesIO(content))
    except (UnidentifiedImageError, OSError, ValueError):
        return content, None
    with picture:
        return _animation(picture)


def _animation(picture: Image.Image) -> tuple[list[Image.Image], float | None]:
    """Return the frames of an animation, and their rate where their durations are known."""
    frames, seconds = [], 0.0
    try:
        for frame in ImageSequence.Iterator(picture):
            frames.append(frame.convert("RGB"))
            seconds += frame.info.get("duration", 0) / 1000
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"frame {len(frames)} of the animation is damaged: {error}") from error
    return frames, len(frames) / seconds if seconds else None


def _sampling(video_processor: Any) -> Callable[..., Any] | None:
    """Return how a video processor picks frames with its own settings, `None` if it takes all."""
    if video_processor is None or not getattr(video_processor, "do_sample_frames", False):
        return None
    names = set(video_processor.valid_kwargs.__annotations__) - NOT_SAMPLING
    settings = {name: getattr(video_processor, name, None) for name in names}
    return lambda metadata, **_: video_processor.sample_frames(metadata=metadata, **settings)


def _decode(content: Path | bytes, sample: Callable[..., Any] | None) -> tuple[np.ndarray, VideoMetadata]:
    backend = next((name for name, module in DECODERS.items() if find_spec(module) is not None), None)
    if backend is None:
        raise ValueError(
            f"none of {', '.join(DECODERS.values())} is installed, of which one decodes video files: pip install "
            "torchcodec, or give the frames as a folder, a list of images or a GIF"
        )

    def every(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        return np.arange(metadata.total_num_frames)

    with tempfile.TemporaryDirectory() as folder:  # `load_video` opens paths
        if isinstance(content, bytes):
            file = Path(folder, "video")
            file.write_bytes(content)
            content = file
        try:
            frames, metadata = load_video(str(content), backend=backend, sample_indices_fn=sample or every)
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            raise ValueError(f"{backend} cannot decode it: {error or type(error).__name__}") from error
        return _stack(frames), metadata


def _stack(frames: Any) -> np.ndarray:
    """Return frames as one array (T, H, W, 3)."""
    pictures = []
    for index, frame in enumerate(frames):
        try:
            pictures.append(np.asarray(decode_image(*read_row_image(frame))))
        except ValueError as error:
            raise ValueError(f"frame {index}: {error}") from error
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{picture.shape[1]} x {picture.shape[0]}" for picture in (pictures[0], pictures[-1])]
            raise ValueError(f"frame {index} is of {sizes[1]} pixels, and frame 0 of {sizes[0]}: make them equal")
    if not pictures:
        raise ValueError("it has no frames")
    return np.stack(pictures)
