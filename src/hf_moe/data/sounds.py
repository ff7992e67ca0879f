"""One function opens a sound, in whatever form it comes, as the samples at the rate that a feature extractor takes."""

import io
import struct
import tempfile
import wave
from collections.abc import Mapping
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import load_audio

from .row_images import one_source, read_row_file


# Under one of these keys a record holds a sound; `sampling_rate` is a number beside it.
SOUND_SOURCES = ("audio", "array", "url", "path", "base64", "bytes")
SOUND_FORMS = (
    "a file (a path, a URL, bytes), or a record of one of them or of an array and its sampling_rate, such as "
    "{'array': [...], 'sampling_rate': 16000}"
)
Samples = tuple[np.ndarray, int]


def open_sound(sound: Any, sampling_rate: int) -> np.ndarray:
    """Return the samples (N,) of a sound as float32, of one channel, at a rate.

    Channels are averaged, integers divided by the largest value of their type.

    Args:
        sound (`Any`): a file of WAV (of another format where Transformers' `load_audio` reads it), a decoder of
            torchcodec, or a dict that holds one of them under `audio`, `path`, `base64` or `bytes`, or the samples
            (N,), (C, N) or (N, C) under `array` and their rate under `sampling_rate`.
        sampling_rate (`int`): of the result, in samples per second.

    Raises:
        ValueError: naming the sound, if it is missing, damaged, empty or of another form, its rate is unknown, or what
            would decode or resample it is not installed.
    """
    name, content, rate = read_sound(sound)
    try:
        if isinstance(content, bytes):
            samples, own = _decode(content, sampling_rate)
            if rate is not None and rate != own:
                raise ValueError(f"sampling_rate={rate} is not that of the file, {own}: leave it out")
        elif rate is None:
            raise ValueError(f"its rate is unknown: write {{'array': ..., 'sampling_rate': {sampling_rate}}}")
        else:
            samples, own = content, rate
        return _resampled(_mono(samples), own, sampling_rate)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a sound: {error}") from error


def read_sound(sound: Any) -> tuple[str, Any, int | None]:
    """Return how errors call a sound, its content (encoded bytes, or an array), and its rate where it is known."""
    if isinstance(sound, Mapping):
        return _read_record(sound)
    if hasattr(sound, "get_all_samples"):  # a decoder of torchcodec, as `datasets` gives
        samples = sound.get_all_samples()
        return "the decoder", samples.data, int(samples.sample_rate)
    if isinstance(sound, list | tuple) or hasattr(sound, "__array__"):
        array = sound if hasattr(sound, "__array__") else np.asarray(sound)
        return f"the array of shape {tuple(array.shape)}", array, None
    encoded = read_row_file(sound, "sound")
    if encoded is None:
        raise ValueError(f"{sound!r:.100} ({type(sound).__name__}) is not a sound; a sound is {SOUND_FORMS}")
    return *encoded, None


def as_wav(samples: Any, sampling_rate: int) -> bytes:
    """Return a WAV file of samples, each a 32-bit float; an array that is no sound is told apart when it is opened."""
    data = np.ascontiguousarray(_mono(samples), dtype="<f4").tobytes()
    # 3 is the format of floats; one channel, then bytes per second and per sample, and bits.
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, sampling_rate, 4 * sampling_rate, 4, 32)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def _read_record(record: Mapping[str, Any]) -> tuple[str, Any, int | None]:
    value, file = one_source(record, SOUND_SOURCES, "sound")
    name, content, rate = read_sound(value)
    name = file or name
    given_rate = record.get("sampling_rate")
    if given_rate is None:
        return name, content, rate
    if isinstance(given_rate, bool) or not isinstance(given_rate, int | float | np.integer) or not given_rate >= 1:
        raise ValueError(f"{name} has sampling_rate={given_rate!r}: it is the number of samples per second")
    return name, content, int(given_rate)


def _decode(content: bytes, sampling_rate: int) -> Samples:
    """Return the samples of an encoded sound and their rate."""
    if not content:
        raise ValueError("it is empty")
    try:
        if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
            return _decode_wav(content)
        if find_spec("soundfile") is None and find_spec("torchcodec") is None:
            raise ValueError(
                "it is no WAV file, and neither soundfile nor torchcodec is installed, which decode others: pip "
                "install soundfile soxr, or convert it to WAV"
            )
        with tempfile.TemporaryDirectory() as folder:  # `load_audio` opens paths
            file = Path(folder, "sound")
            file.write_bytes(content)
            return load_audio(str(file), sampling_rate=sampling_rate), sampling_rate
    except ValueError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ValueError(str(error) or type(error).__name__) from error


def _decode_wav(content: bytes) -> Samples:
    if find_spec("scipy") is not None:
        from scipy.io import wavfile

        rate, samples = wavfile.read(io.BytesIO(content))  # (N,) or (N, C)
        return samples.T, rate
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except wave.Error as error:
        raise ValueError(f"{error}; with scipy installed all WAV files are read: pip install scipy") from error
    if width == 3:  # brought to 32 bits
        data = b"".join(b"\0" + data[start : start + 3] for start in range(0, len(data), 3))
    samples = np.frombuffer(data, {1: "u1", 2: "<i2", 3: "<i4", 4: "<i4"}[width])
    return samples.reshape(-1, channels).T, rate


def _mono(samples: Any) -> np.ndarray:
    """Return samples as one channel of float32."""
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu().float() if samples.is_floating_point() else samples.cpu()
    array = np.asarray(samples)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"its samples are of type {array.dtype}")
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"samples of shape {array.shape} are none: one dimension, or channels and samples")
    if array.dtype.kind == "u":  # of 8 bits around the middle
        array = array.astype(np.float32) / (np.iinfo(array.dtype).max / 2 + 0.5) - 1
    elif array.dtype.kind == "i":
        array = array.astype(np.float64) / -float(np.iinfo(array.dtype).min)
    if array.ndim == 2:
        array = array.mean(axis=int(array.shape[0] > array.shape[1]))
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return np.ascontiguousarray(array, dtype=np.float32)


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return samples
    if find_spec("scipy") is not None:
        from scipy.signal import resample_poly

        shared = gcd(rate, wanted)
        return resample_poly(samples, wanted // shared, rate // shared).astype(np.float32)
    if find_spec("torchaudio") is not None:
        from torchaudio.functional import resample

        return resample(torch.from_numpy(samples), rate, wanted).numpy()
    raise ValueError(
        f"it has {rate} samples per second, the model wants {wanted}, and neither scipy nor torchaudio is installed, "
        "which resample: pip install scipy"
    )
