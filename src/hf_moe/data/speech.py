"""Spoken words from eSpeak NG, in as many voices as one likes, out of the PyPI package `espeakng-loader`."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


SAMPLING_RATE = 16_000
# Names that the C interface of eSpeak NG gives to its constants.
AUDIO_OUTPUT_SYNCHRONOUS, CHARS_UTF8, POS_CHARACTER, RATE, PITCH = 2, 1, 1, 1, 3
ON_SAMPLES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesiser:
    """eSpeak NG, which has one state in a process: take the one that [`synthesiser`] returns."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
            import scipy.signal
        except ImportError as error:
            raise ImportError("eSpeak NG makes speech: pip install espeakng-loader scipy (hf-moe[senses]).") from error
        self._resample = scipy.signal.resample_poly
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        folder = Path(espeakng_loader.get_data_path())
        self._variants = folder / "voices" / "!v"
        self._rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, str(folder).encode(), 0)
        if self._rate <= 0:
            raise OSError(f"eSpeak NG cannot read its data in {folder}: install espeakng-loader again.")
        self._pieces: list[np.ndarray] = []
        self._on_samples = ON_SAMPLES(self._keep)  # Held here as long as the library may call it.
        self._library.espeak_SetSynthCallback(self._on_samples)

    def _keep(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, words_per_minute: int = 150, pitch: int = 50) -> np.ndarray:
        """Return a text as spoken: float32 (samples,) at 16 kHz, within -1 to 1, no silence before or after.

        Where in its wave a voice begins depends on what the process has spoken before: the same texts in the same
        order give the same samples.

        Args:
            voice (`str`): a language of eSpeak NG, and a variant of its voice, such as `en-us+f3`.
            words_per_minute (`int`, *optional*, defaults to `150`): 80 to 450.
            pitch (`int`, *optional*, defaults to `50`): 0 to 100.
        """
        # The library would take a variant that it does not have for none.
        variant = voice.partition("+")[2]
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            form = f"a language and a variant, such as en-us+f3; variants are the files in {self._variants}"
            raise ValueError(f"eSpeak NG has no voice {voice!r}: a voice is {form}.")
        self._library.espeak_SetParameter(RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._pieces.clear()
        spoken = ctypes.create_string_buffer(text.encode())
        self._library.espeak_Synth(spoken, len(spoken), 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
        samples = np.concatenate([np.zeros(0, np.short), *self._pieces]).astype(np.float32) / 2**15
        heard = np.nonzero(np.abs(samples) > 0.004)[0]
        if not len(heard):
            raise ValueError(f"The voice {voice!r} says nothing to {text!r}.")
        wave = self._resample(samples[heard[0] : heard[-1] + 1], SAMPLING_RATE, self._rate)
        return np.clip(wave, -1.0, 1.0).astype(np.float32)


@cache
def synthesiser() -> Synthesiser:
    """Return the synthesiser of this process."""
    return Synthesiser()
