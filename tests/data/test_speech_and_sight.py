"""Digits to hear, to see and to watch: what the rows ask, and that the test split has other voices and writers."""

import sys

import numpy as np
import pytest

from hf_moe.data import speech, speech_and_sight
from hf_moe.data.speech_and_sight import (
    LESSONS,
    SIDE,
    SPOKEN_DIGITS,
    VARIANTS,
    handwritten,
    load_speech_and_sight,
    moving,
)


COLUMNS = {"audio": "audios", "image": "images", "video": "videos"}


@pytest.fixture
def said(monkeypatch):
    """What was spoken, in the order of the rows, with no synthesiser."""
    words = []

    def spoken(word, split, random):
        words.append(word)
        return {"array": np.full(8, len(words), np.float32), "sampling_rate": 16_000}

    monkeypatch.setattr(speech_and_sight, "spoken", spoken)
    return words


@pytest.fixture
def shown(monkeypatch):
    """What was seen, told by pictures of one colour each."""
    pictures = [[np.full((8, 8), 20 * digit, np.uint8)] for digit in range(10)]
    monkeypatch.setattr(speech_and_sight, "handwritten", lambda split: pictures)
    return lambda picture: SPOKEN_DIGITS[round(np.asarray(picture).mean() / 20)]


def test_a_row_brings_what_its_messages_announce(said):
    for index, row in enumerate(load_speech_and_sight("train", limit=14)):
        *announced, question = row["messages"][0]["content"]
        parts, kind = LESSONS[index % len(LESSONS)]
        assert sorted(part["type"] for part in announced) == sorted(parts)
        assert {part for part, column in COLUMNS.items() if row[column]} == set(parts)
        assert question["text"] == speech_and_sight.QUESTIONS[kind]
        assert row["question_type"] == kind
        assert row["messages"][1]["content"][0]["text"] == row["answer"]


def test_answers_tell_what_is_heard_and_seen(said, shown):
    rows = load_speech_and_sight("test", limit=70)
    heard = iter(said)
    for row in rows:
        word = next(heard) if row["audios"] else None
        picture = shown(row["images"][0]) if row["images"] else None
        right = {"hear": word, "see": picture, "compare": "yes" if word == picture else "no"}
        assert row["answer"] == right.get(row["question_type"], row["answer"])


def test_half_of_the_comparisons_are_true(said):
    rows = load_speech_and_sight("train", limit=700)
    answers = [row["answer"] for row in rows.remove_columns(["images", "videos"]) if row["question_type"] == "compare"]
    assert answers.count("yes") == answers.count("no") == 100


def test_rows_are_the_same_every_time(said):
    first, second = (load_speech_and_sight("test", limit=7) for _ in range(2))
    assert first["messages"] == second["messages"]
    assert [np.asarray(image).tolist() for row in first for image in row["images"]] == [
        np.asarray(image).tolist() for row in second for image in row["images"]
    ]


def test_splits_share_no_voice_and_no_picture():
    assert not set(VARIANTS["train"]) & set(VARIANTS["test"])
    pictures = [{picture.tobytes() for digit in handwritten(split) for picture in digit} for split in VARIANTS]
    assert [len(split) for split in pictures] == [1437, 360]
    assert not pictures[0] & pictures[1]


@pytest.mark.parametrize(
    ("direction", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
def test_a_video_moves_where_its_answer_says(direction, axis, sign):
    frames = [np.asarray(frame).mean(-1) for frame in moving(np.full((8, 8), 255, np.uint8), direction)]
    assert {frame.shape for frame in frames} == {(SIDE, SIDE)}
    steps = np.diff([[index.mean() for index in np.nonzero(frame)] for frame in frames], axis=0)
    assert (np.sign(steps[:, axis]) == sign).all()
    assert not steps[:, 1 - axis].any()


def test_voices_speak_at_sixteen_kilohertz():
    pytest.importorskip("espeakng_loader")
    espeak = speech.synthesiser()
    voices = [f"{language}+{name}" for names in VARIANTS.values() for name in names for language in ("en", "en-us")]
    waves = {voice: espeak.speak("seven", voice) for voice in voices}
    assert len({wave.tobytes() for wave in waves.values()}) == len(voices)
    for wave in waves.values():
        assert wave.dtype == np.float32
        assert 0.2 < len(wave) / speech.SAMPLING_RATE < 1.0
        assert 0.1 < np.abs(wave).max() <= 1.0


def period(wave):
    """The fewest samples after which a vowel is like itself, from 40 of them on."""
    middle = wave[len(wave) // 2 - 1000 : len(wave) // 2 + 1000]
    likeness = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 40 + (likeness[40:] > 0.8 * likeness[40:].max()).argmax()


def test_speed_and_pitch_are_heard():
    pytest.importorskip("espeakng_loader")
    espeak = speech.synthesiser()
    slow, fast = (espeak.speak("seven", "en-us", words_per_minute=rate) for rate in (100, 200))
    assert len(fast) < 0.8 * len(slow)
    low, high = (period(espeak.speak("ee", "en-us", words_per_minute=80, pitch=pitch)) for pitch in (20, 80))
    assert high < 0.8 * low


@pytest.mark.parametrize("voice", ["tlh-x", "en-us+nobody"])
def test_an_unknown_voice_is_refused_by_name(voice):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(ValueError, match=f"no voice '{voice}'".replace("+", r"\+")):
        speech.synthesiser().speak("seven", voice)


def test_a_text_of_no_sound_is_refused():
    pytest.importorskip("espeakng_loader")
    with pytest.raises(ValueError, match="says nothing to ''"):
        speech.synthesiser().speak("", "en-us")


@pytest.mark.parametrize(
    ("module", "load"), [("espeakng_loader", speech.Synthesiser), ("sklearn.datasets", lambda: handwritten("test"))]
)
def test_what_is_missing_is_said_with_its_install(module, load, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install .*hf-moe\[senses\]"):
        load()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="splits train, test, got 'validation'"):
        load_speech_and_sight("validation")
