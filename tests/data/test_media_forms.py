"""Videos and sounds of rows, in every form in which they come."""

import io
import json
import wave

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, List, Video, load_from_disk
from helpers.hosts.processors import HOSTS, RATE
from PIL import Image
from scipy.io import wavfile

from hf_moe.data import VisionLanguageCollator, load_rows
from hf_moe.data import sounds as sounds_module
from hf_moe.data import videos as videos_module
from hf_moe.data.row_images import undecoded
from hf_moe.data.rows import row_media, row_messages
from hf_moe.data.sounds import open_sound
from hf_moe.data.videos import open_video


FRAMES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
SAMPLES = (np.sin(np.arange(6000) / 9) / 2).astype(np.float32)
ASKED = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a thing"}]


def pictures(frames=FRAMES):
    return [Image.fromarray(frame) for frame in frames]


@pytest.fixture
def folder(tmp_path):
    """A folder with a video as a folder of frames and as an animation, and a sound."""
    (tmp_path / "frames").mkdir()
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / "frames" / f"{index * 5}.png")  # 5 comes before 10, not after
    (tmp_path / "frames" / "notes.txt").write_text("no frame")
    first, *others = pictures()
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, duration=500, lossless=True)
    wavfile.write(tmp_path / "sound.wav", RATE, SAMPLES)
    return tmp_path


def animation():
    file = io.BytesIO()
    first, *others = pictures()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=500, lossless=True)
    return file.getvalue()


def wav(samples=SAMPLES, rate=RATE):
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


class Decoder:
    """As torchcodec's decoders, which `datasets` gives for a video and a sound."""

    class metadata:  # noqa: N801
        average_fps = 2.0

    def __len__(self):
        return len(FRAMES)

    def __getitem__(self, index):
        return torch.from_numpy(FRAMES[index]).permute(2, 0, 1)

    def get_frames_at(self, indices):
        raise NotImplementedError

    def get_all_samples(self):
        class Heard:
            data, sample_rate = torch.from_numpy(np.stack([SAMPLES, SAMPLES])), RATE

        return Heard


VIDEOS = {
    "folder": lambda folder: str(folder / "frames"),
    "path": lambda folder: folder / "clip.webp",
    "opened": lambda folder: (folder / "clip.webp").open("rb"),
    "list of images": lambda _: pictures(),
    "list of paths": lambda folder: [str(folder / "frames" / f"{index * 5}.png") for index in range(4)],
    "array": lambda _: FRAMES,
    "lists of numbers": lambda _: FRAMES.tolist(),
    "tensor, channels first": lambda _: torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
    "floats": lambda _: FRAMES / 255,
    "bytes": lambda _: animation(),
    "animation": lambda _: Image.open(io.BytesIO(animation())),
    "record of bytes": lambda _: {"bytes": animation(), "path": "x.webp"},
    "record of frames": lambda _: {"frames": pictures(), "fps": 2},
    "decoder": lambda _: Decoder(),
}


@pytest.mark.parametrize("form", VIDEOS)
def test_a_video_is_the_same_in_every_form(form, folder):
    frames, known = open_video(VIDEOS[form](folder))
    assert np.array_equal(frames, FRAMES)
    timed = form in ("path", "opened", "bytes", "animation", "record of bytes", "record of frames", "decoder")
    assert known.fps == (2 if timed else None)
    assert (known.total_num_frames, known.height, known.width, list(known.frames_indices)) == (4, 16, 16, [0, 1, 2, 3])


def test_frames_of_known_rate_are_picked_by_the_video_processor():
    processor = HOSTS["qwen3_vl"]().processor.video_processor
    processor.fps, processor.min_frames = 1, 2
    frames, known = open_video({"frames": pictures(), "fps": 2}, processor)
    assert len(frames) == 2 and len(known.frames_indices) == 2
    assert np.array_equal(frames, FRAMES[known.frames_indices])
    assert len(open_video(pictures(), processor)[0]) == 4
    processor.do_sample_frames = False
    assert len(open_video({"frames": pictures(), "fps": 2}, processor)[0]) == 4


WRONG_VIDEOS = {
    "an empty list": ([], "an empty list of frames"),
    "three dimensions": (FRAMES[0], r"shape \(16, 16, 3\) is no video"),
    "another type": (5, "is not a video; a video is a folder of frames"),
    "a missing file": ("lost.mp4", "there is no file 'lost.mp4'"),
    "two sizes": (pictures() + [Image.new("RGB", (8, 8))], "frame 4 is of 8 x 8 pixels, and frame 0 of 16 x 16"),
    "a damaged frame": ([b"x"], "frame 0: "),
    "uneven numbers": ([[[1, 2], [3]]], "lists of unequal lengths are no array"),
    "two keys": ({"frames": pictures(), "path": "x"}, "videos under frames and path"),
    "no key": ({"fps": 2}, "no video under its keys"),
    "a rate of nothing": ({"frames": pictures(), "fps": 0}, "fps=0"),
    "a rate of a file": ({"bytes": b"no animation", "fps": 2}, "fps=2, which its file knows itself"),
}


@pytest.mark.parametrize("wrong", WRONG_VIDEOS)
def test_a_wrong_video_is_refused_by_name(wrong):
    video, message = WRONG_VIDEOS[wrong]
    with pytest.raises(ValueError, match=message):
        open_video(video)


def test_without_a_decoder_the_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(videos_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="none of torchcodec, av, decord, cv2 is installed.* pip install torchcodec"):
        open_video(b"\0\0\0 ftypmp42")


def test_a_video_file_goes_through_the_decoder_that_is_installed(monkeypatch):
    asked = []

    def load_video(path, backend, sample_indices_fn):
        known = videos_module.VideoMetadata(total_num_frames=4, fps=2)
        known.frames_indices = sample_indices_fn(metadata=known)
        with open(path, "rb") as file:
            asked.append((backend, file.read()))
        return FRAMES[known.frames_indices], known

    monkeypatch.setattr(videos_module, "find_spec", lambda name: name == "av" or None)
    monkeypatch.setattr(videos_module, "load_video", load_video)
    frames, known = open_video(b"a film")
    assert asked == [("pyav", b"a film")] and np.array_equal(frames, FRAMES) and known.fps == 2
    processor = HOSTS["qwen3_vl"]().processor.video_processor
    processor.fps, processor.min_frames = 1, 2
    assert len(open_video(b"a film", processor)[0]) == 2


SOUNDS = {
    "path": lambda folder: folder / "sound.wav",
    "text": lambda folder: str(folder / "sound.wav"),
    "bytes": lambda _: wav(),
    "16 bits": lambda _: wav((SAMPLES * 32767).astype(np.int16)),
    "32 bits": lambda _: wav((SAMPLES.astype(np.float64) * 2**31).astype(np.int32)),
    "8 bits": lambda _: wav(((SAMPLES + 1) * 127.5).astype(np.uint8)),
    "stereo": lambda _: wav(np.stack([SAMPLES * 1.5, SAMPLES * 0.5], 1)),
    "array": lambda _: {"array": SAMPLES, "sampling_rate": RATE},
    "list": lambda _: {"array": SAMPLES.tolist(), "sampling_rate": RATE},
    "channels first": lambda _: {"array": torch.from_numpy(np.stack([SAMPLES] * 2)), "sampling_rate": RATE},
    "record of bytes": lambda _: {"bytes": wav(), "path": "x.wav"},
    "decoder": lambda _: Decoder(),
}


@pytest.mark.parametrize("form", SOUNDS)
def test_a_sound_is_the_same_in_every_form(form, folder):
    heard = open_sound(SOUNDS[form](folder), RATE)
    assert heard.dtype == np.float32
    np.testing.assert_allclose(heard, SAMPLES, atol=1 / 64 if form == "8 bits" else 1e-4)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_are_read_without_scipy(width, monkeypatch):
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(2)
        written.setsampwidth(width)
        written.setframerate(RATE)
        levels = (SAMPLES.astype(np.float64) * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
        data = b"".join(int(level).to_bytes(width, "little", signed=width > 1) * 2 for level in levels)
        written.writeframes(data)
    with_scipy = open_sound(file.getvalue(), RATE)
    monkeypatch.setattr(sounds_module, "find_spec", lambda name: None)
    np.testing.assert_allclose(open_sound(file.getvalue(), RATE), with_scipy, atol=1e-7)
    np.testing.assert_allclose(with_scipy, SAMPLES, atol=1 / 100 if width == 1 else 1e-4)


def test_another_rate_is_resampled_or_refused_by_name(monkeypatch):
    half = open_sound({"array": SAMPLES, "sampling_rate": RATE}, RATE // 2)
    assert half.shape == (3000,)
    np.testing.assert_allclose(half[100:-100], SAMPLES[200:-200:2], atol=1e-2)
    monkeypatch.setattr(sounds_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="16000 samples per second, the model wants 8000, and neither scipy nor"):
        open_sound({"array": SAMPLES, "sampling_rate": RATE}, RATE // 2)


WRONG_SOUNDS = {
    "no rate": (SAMPLES, "its rate is unknown"),
    "another type": (5, "is not a sound; a sound is a file"),
    "a missing file": ("lost.wav", "there is no file 'lost.wav'"),
    "nothing": (b"", "it is empty"),
    "another format": (b"ID3 a song", "it is no WAV file, and neither soundfile nor torchcodec"),
    "a damaged file": (wav()[:20], "cannot be read as a sound"),
    "no samples": ({"array": [], "sampling_rate": RATE}, r"samples of shape \(0,\) are none"),
    "three dimensions": ({"array": np.ones((2, 2, 2)), "sampling_rate": RATE}, "are none"),
    "NaN": ({"array": [0.0, float("nan")], "sampling_rate": RATE}, "NaN"),
    "a text as rate": ({"array": SAMPLES, "sampling_rate": "fast"}, "sampling_rate='fast'"),
    "a rate of nothing": ({"array": SAMPLES, "sampling_rate": 0}, "sampling_rate=0"),
    "another rate than the file's": ({"bytes": wav(), "sampling_rate": 8000}, "sampling_rate=8000 is not that of the"),
    "two keys": ({"array": SAMPLES, "bytes": wav()}, "sounds under array and bytes"),
    "words": ({"array": ["a", "b"], "sampling_rate": RATE}, "its samples are of type"),
}


@pytest.mark.parametrize("wrong", WRONG_SOUNDS)
def test_a_wrong_sound_is_refused_by_name(wrong, monkeypatch):
    monkeypatch.setattr(sounds_module, "find_spec", lambda name: name == "scipy" or None)
    sound, message = WRONG_SOUNDS[wrong]
    with pytest.raises(ValueError, match=message):
        open_sound(sound, RATE)


def part(kind, **fields):
    user = {"role": "user", "content": [{"type": kind, **fields}, {"type": "text", "text": "what is it?"}]}
    return {"messages": [user, ASKED[1]]}


def write(folder, *rows):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


ROWS = {
    "columns": {"messages": ASKED, "videos": ["frames"], "audios": ["sound.wav"]},
    "column of one": {"messages": ASKED, "video": "clip.webp", "audio": "sound.wav"},
    "frames": {
        "messages": ASKED, "videos": [[f"frames/{index * 5}.png" for index in range(4)]], "audios": "sound.wav",
    },
    "placeholders": {
        "conversations": [{"from": "human", "value": "<audio><video>?"}, {"from": "gpt", "value": "a thing"}],
        "videos": ["frames"], "audios": ["sound.wav"],
    },
    "question": {"question": "what is it?", "answer": "a thing", "videos": ["frames"], "audios": ["sound.wav"]},
    "numbers": {"messages": ASKED, "videos": [FRAMES.tolist()], "audios": ["sound.wav"]},
    "records": {
        "messages": ASKED, "videos": [{"path": "frames", "fps": 2}],
        "audios": [{"array": SAMPLES.tolist(), "sampling_rate": RATE}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_rows_of_files_hold_videos_and_sounds(form, kind, folder):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write(folder, ROWS[form], {"messages": ASKED})
    elif kind == "json":
        path.write_text(json.dumps([ROWS[form]]))
    elif kind == "parquet":
        Dataset.from_list([ROWS[form]]).to_parquet(path)
    else:
        cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in ROWS[form].items()}
        Dataset.from_list([cells]).to_csv(path)
    loaded = load_rows(path)[0]
    (video,), (sound,) = row_media(loaded, "video"), row_media(loaded, "audio")
    frames, known = open_video(video)
    assert np.array_equal(frames, FRAMES)
    assert known.fps == (2 if form in ("records", "column of one") else None)
    np.testing.assert_allclose(open_sound(sound, RATE), SAMPLES, atol=1e-6)
    kinds = [part["type"] for part in row_messages(loaded)[0]["content"]]
    assert kinds == (["audio", "video", "text"] if form == "placeholders" else ["video", "audio", "text"])


def test_parts_of_messages_bring_their_own(folder):
    content = [
        {"type": "audio", "audio": "sound.wav"},
        {"type": "video", "video": "frames", "fps": 2},
        {"type": "audio_url", "audio_url": {"url": "sound.wav"}},
        {"type": "video", "path": "clip.webp"},
        {"type": "text", "text": "what is it?"},
    ]
    rows = load_rows(write(folder, {"messages": [{"role": "user", "content": content}, ASKED[1]]}))
    videos, sounds = row_media(rows[0], "video"), row_media(rows[0], "audio")
    assert [open_video(video)[1].fps for video in videos] == [2, 2]
    assert all(np.array_equal(open_sound(sound, RATE), SAMPLES) for sound in sounds)
    batch = VisionLanguageCollator(HOSTS["qwen2_5_omni"]().processor)(list(rows))
    kinds = batch["mm_token_type_ids"][0]
    assert kinds[kinds > 0].unique_consecutive().tolist() == [3, 2, 3, 2]


def test_rows_in_memory_keep_arrays(folder):
    rows = load_rows([{"messages": ASKED, "videos": [FRAMES], "audios": [{"array": SAMPLES, "sampling_rate": RATE}]}])
    assert np.array_equal(open_video(rows[0]["videos"][0])[0], FRAMES)
    assert np.array_equal(open_sound(rows[0]["audios"][0], RATE), SAMPLES)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": ASKED, "videos": ["lost.mp4"]}, "has no video at .*lost.mp4"),
        ({"messages": ASKED, "audios": ["sound.wav", "lost.wav"]}, "has no sound at .*lost.wav"),
        ({"messages": ASKED, "audios": [{"array": [0.5]}]}, "has no readable sound: its rate is unknown"),
        ({"messages": ASKED, "videos": [None]}, "has no video 0 among its 1 videos"),
        ({"messages": ASKED, "videos": ["frames"], "video": "frames"}, "has both 'videos' and 'video'"),
        (part("audio", audio="sound.wav", path="sound.wav"), "has an audio part with audio and path"),
        (part("video", fps=2), "has a video part with fps and no video"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "audio"}]}]}, "has a sound in message 1"),
    ],
)
def test_a_wrong_row_names_file_and_row(row, message, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"Row 1 of .*rows.jsonl {message}"):
        load_rows(write(folder, {"messages": ASKED}, row))


def test_features_of_datasets_are_not_decoded(folder):
    rows = Dataset.from_dict(
        {"messages": [ASKED], "audios": [[str(folder / "sound.wav")]], "video": [str(folder / "clip.webp")]}
    )
    rows = rows.cast_column("audios", List(Audio())).cast_column("video", Video())
    for held in (rows, rows.to_iterable_dataset()):
        row = next(iter(undecoded(held)))
        assert np.array_equal(open_sound(row["audios"][0], RATE), SAMPLES)
        assert np.array_equal(open_video(row["video"])[0], FRAMES)
        assert VisionLanguageCollator(HOSTS["qwen2_5_omni"]().processor)([row])["pixel_values_videos"].numel()


def test_rows_saved_to_disk_hold_what_they_held(folder):
    load_rows(write(folder, ROWS["records"])).save_to_disk(folder / "saved")
    row = load_from_disk(folder / "saved")[0]
    assert np.array_equal(open_video(row["videos"][0])[0], FRAMES)
    assert np.array_equal(open_sound(row["audios"][0], RATE), SAMPLES)


@pytest.mark.parametrize("described", [False, True])
def test_a_folder_of_sounds_is_a_row_for_each(described, tmp_path):
    for name in ("cat", "dog"):
        place = tmp_path / "heard" / ("" if described else name)
        place.mkdir(parents=True, exist_ok=True)
        wavfile.write(place / f"{name}.wav", RATE, SAMPLES)
    if described:
        (tmp_path / "heard" / "metadata.csv").write_text("file_name,answer\ncat.wav,cat\ndog.wav,dog\n")
    rows = load_rows({"audio_folder": str(tmp_path / "heard"), "question": "Who is it?"})
    assert [row_messages(row)[-1]["content"][0]["text"] for row in rows] == ["cat", "dog"]
    assert np.array_equal(open_sound(rows[1]["audios"][0], RATE), SAMPLES)
    with pytest.raises(ValueError, match="have no questions"):
        load_rows(str(tmp_path / "heard"))
    with pytest.raises(ValueError, match="has the splits train, got 'test'"):
        load_rows({"audio_folder": str(tmp_path / "heard"), "question": "Who is it?"}, "test")


def test_a_damaged_sound_names_the_row_of_the_batch():
    wrong = {"messages": ASKED, "audios": [wav(), b"RIFF\0\0\0\0WAVE"], "id": "b"}
    with pytest.raises(ValueError, match=r"Row 1 of the batch \(id 'b'\) has no readable sound 1: "):
        VisionLanguageCollator(HOSTS["qwen2_audio"]().processor)([{"messages": ASKED}, wrong])
