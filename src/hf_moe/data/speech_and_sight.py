"""Digits to hear, to see and to watch: one data set with all four modalities.

Digits are spoken by eSpeak NG (PyPI `espeakng-loader`), in the test split by voices that training does not have. They
are written by hand (scikit-learn's `load_digits`, 1,797 pictures of 8 x 8, a fifth of them in the test split), and
they move, in short videos. Rows of a picture and a sound come with one of three questions, so that the text decides
which of the two answers; whether both show the same digit can be told from neither alone.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from .rows import MESSAGES, text_part
from .speech import SAMPLING_RATE, synthesiser


SPOKEN_DIGITS = "zero one two three four five six seven eight nine".split()
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTIONS = {
    "hear": "Which digit do you hear?",
    "see": "Which digit do you see?",
    "watch": "Where does the digit move?",
    "compare": "Do you hear and see the same digit?",
}
# The medium of a row, and its question.
LESSONS = (
    (("audio",), "hear"),
    (("image",), "see"),
    (("video",), "watch"),
    (("audio", "image"), "hear"),
    (("audio", "image"), "see"),
    (("audio", "image"), "compare"),
    (("audio", "image"), "compare"),
)
LANGUAGES = ("en", "en-us", "en-gb-scotland", "en-029", "en-gb-x-rp")
VARIANTS = {
    "train": "m1 m2 m3 m4 m5 m6 f1 f2 f3 f4 Andy Alicia Gene Jacky Lee Mario edward linda paul zac".split(),
    "test": "m7 m8 f5 Annie Michael".split(),
}
ROWS = {"train": 14_000, "test": 1_400}
SIDE, FRAMES = 24, 4  # of pictures and videos, in pixels and pictures
AUDIO = {"array": List(Value("float32")), "sampling_rate": Value("int64")}


def load_speech_and_sight(split: str, limit: int | None = None) -> Dataset:
    """Load the rows: 14,000 in `train`, 1,400 in `test`, the seven kinds of rows in turn.

    Columns: `messages`, `images`, `videos` (lists of frames), `audios` (`array` and `sampling_rate`), `question_type`
    (`hear`, `see`, `watch`, `compare`), `answer`.

    Args:
        limit (`int`, *optional*): how many rows, *optional*.

    Raises:
        ImportError: if `espeakng-loader` or `scikit-learn` is not installed.
        ValueError: if `split` is neither `train` nor `test`.
    """
    if split not in ROWS:
        raise ValueError(f"Speech and sight has the splits {', '.join(ROWS)}, got {split!r}.")
    media = {"images": List(Image()), "videos": List(List(Image())), "audios": List(AUDIO)}
    names = {name: Value("string") for name in ("question_type", "answer")}
    rows = list(_rows(split, min(limit or ROWS[split], ROWS[split])))
    return Dataset.from_list(rows, features=Features({"messages": MESSAGES, **media, **names}))


def _rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(list(ROWS).index(split))
    pictures = handwritten(split)
    for index in range(count):
        parts, question = LESSONS[index % len(LESSONS)]
        seen, heard = (int(digit) for digit in random.integers(10, size=2))
        if question == "compare":
            heard = seen if index % 2 else (seen + int(random.integers(1, 10))) % 10
        picture = pictures[seen][random.integers(len(pictures[seen]))]
        direction = str(random.choice(list(DIRECTIONS)))
        same = "yes" if heard == seen else "no"
        answers = {"hear": SPOKEN_DIGITS[heard], "see": SPOKEN_DIGITS[seen], "watch": direction, "compare": same}
        content = [{"type": part, "text": None} for part in random.permutation(parts).tolist()]
        yield {
            "messages": [
                {"role": "user", "content": [*content, text_part(QUESTIONS[question])]},
                {"role": "assistant", "content": [text_part(answers[question])]},
            ],
            "images": [scaled(picture, SIDE)] if "image" in parts else [],
            "videos": [moving(picture, direction)] if "video" in parts else [],
            "audios": [spoken(SPOKEN_DIGITS[heard], split, random)] if "audio" in parts else [],
            "question_type": question,
            "answer": answers[question],
        }


def handwritten(split: str) -> list[list[np.ndarray]]:
    """Return the pictures (8, 8) of every digit, uint8; those of the test split are the last fifth of the file."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Digits come with scikit-learn: pip install scikit-learn (or hf-moe[senses]).") from error
    digits = load_digits()
    border = len(digits.target) * 4 // 5
    chosen = slice(border) if split == "train" else slice(border, None)
    pictures = (digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    return [list(pictures[digits.target[chosen] == digit]) for digit in range(10)]


def scaled(picture: np.ndarray, side: int) -> Any:
    """Return a picture in colour, `side` pixels high and wide."""
    return Pictures.fromarray(picture).resize((side, side), Pictures.Resampling.BICUBIC).convert("RGB")


def moving(picture: np.ndarray, direction: str) -> list[Any]:
    """Return the frames in which a digit of half the side crosses the picture in a direction."""
    half = SIDE // 2
    digit = scaled(picture, half)
    across, down = DIRECTIONS[direction]
    frames = []
    for step in np.linspace(-half / 2, half / 2, FRAMES):
        frame = Pictures.new("RGB", (SIDE, SIDE))
        frame.paste(digit, (round(half / 2 + across * step), round(half / 2 + down * step)))
        frames.append(frame)
    return frames


def spoken(word: str, split: str, random: np.random.Generator) -> dict[str, Any]:
    """Return a word in a voice of the split, at a speed and a pitch of its own."""
    voice = f"{random.choice(LANGUAGES)}+{random.choice(VARIANTS[split])}"
    speed, pitch = int(random.integers(130, 190)), int(random.integers(25, 76))
    return {"array": synthesiser().speak(word, voice, speed, pitch), "sampling_rate": SAMPLING_RATE}
