"""Where rows come from."""

import json

import pytest

from hf_moe.data import VisionLanguageCollator, load_rows


@pytest.fixture
def write_jsonl(tmp_path, picture):
    def write(*rows):
        picture(0).save(tmp_path / "a.png")
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "rows.jsonl")

    return write


def plain_row(image="a.png", answer="circle", **extra):
    messages = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image], **extra}


def test_easy_vqa_has_one_question_a_row():
    rows = load_rows("easy_vqa", "test")
    assert len(rows) == 9673
    assert set(rows["question_type"]) == {"yes/no", "shape", "color"}
    assert rows.select_columns(["image_id"])[0] == {"image_id": "test/0"}
    row = rows[0]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert row["messages"][1]["content"][0]["text"] == row["answer"]
    assert row["images"][0].size == (64, 64)


def test_limit_comes_after_a_seeded_shuffle():
    source = {"name": "easy_vqa", "limit": 20, "shuffle": True, "seed": 3}
    first, again = (load_rows(source, "test")["image_id"] for _ in range(2))
    assert list(first) == list(again)
    assert len(first) == 20 and len(set(first)) > 10


def test_jsonl_rows_are_relative_to_their_file(write_jsonl, processor):
    parts = [{"type": "text", "text": "what is"}, {"type": "image"}]
    mixed = [{"role": "user", "content": parts}, {"role": "assistant", "content": "dark"}]
    path = write_jsonl(plain_row(level=2), {"messages": mixed, "images": ["a.png"], "level": 3})
    rows = load_rows(path)
    assert rows["level"][:] == [2, 3]
    assert rows[0]["images"][0].size == (20, 20)
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "text"]
    assert [part["type"] for part in rows[1]["messages"][0]["content"]] == ["text", "image"]
    assert VisionLanguageCollator(processor)(list(rows))["pixel_values"].shape[0] == 2


def test_jsonl_path_takes_the_split(tmp_path, write_jsonl):
    write_jsonl(plain_row())
    assert len(load_rows({"path": str(tmp_path / "{split}.jsonl")}, "rows")) == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, "Row 1 .* list 'messages'"),
        (plain_row(image="lost.png"), "Row 1 .* no image .*lost.png"),
        ({"messages": [{"role": "user"}]}, "Row 1 .* 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "Row 1 .* 'text', 'image'"),
    ],
)
def test_jsonl_errors_name_the_row(write_jsonl, row, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_rows(write_jsonl(plain_row(), row))


def test_broken_json_names_the_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [')
    with pytest.raises(ValueError, match="Row 0 of .*rows.jsonl"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_image_folder_reads_its_metadata(tmp_path, picture):
    folder = tmp_path / "train"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    picture(1).save(folder / "b.png")
    (folder / "metadata.csv").write_text("file_name,question,answer\na.png,what is this ?,circle\nb.png,,blue\n")
    rows = load_rows({"image_folder": str(tmp_path), "question": "is this dark ?"})
    asked = [row["messages"][0]["content"][1]["text"] for row in rows]
    assert sorted(zip(asked, rows["answer"], strict=True)) == [
        ("is this dark ?", "blue"),
        ("what is this ?", "circle"),
    ]
    assert set(rows["image_id"]) == {"train/a.png", "train/b.png"}
    assert rows[0]["images"][0].size == (20, 20)


def test_image_folder_answers_with_its_class_folders(tmp_path, picture):
    for index, name in enumerate(("red", "blue")):
        (tmp_path / name).mkdir()
        picture(index).save(tmp_path / name / "x.png")
    rows = load_rows({"image_folder": str(tmp_path), "question": "what is this ?"})
    assert sorted(rows["answer"]) == ["blue", "red"]
    with pytest.raises(ValueError, match="have no questions"):
        load_rows(str(tmp_path))


def test_image_folder_without_answers_is_refused(tmp_path, picture):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="metadata.csv"):
        load_rows({"image_folder": str(tmp_path), "question": "what ?"})


def test_hub_rows_may_be_streamed(tmp_path, write_jsonl):
    rows = load_rows(write_jsonl(plain_row(), plain_row(answer="dark")))
    (tmp_path / "user").mkdir()
    rows.to_parquet(tmp_path / "user" / "train.parquet")
    rows = load_rows({"hub": str(tmp_path / "user"), "streaming": True, "limit": 1})
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["circle"]


def test_hub_rows_without_messages_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns a, b and no messages"):
        load_rows({"hub": str(tmp_path)})


@pytest.mark.parametrize(
    "source, error, message",
    [
        ({"file": "x"}, ValueError, "one of the keys image_folder, video_folder, audio_folder, hub, path, name"),
        ({"name": "easy_vqb"}, ValueError, "known: easy_vqa"),
        ({"hub": "a/b", "streeming": True}, ValueError, "Did you mean 'streaming'"),
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
        ({"image_folder": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_wrong_sources_are_explained(source, error, message):
    with pytest.raises(error, match=message):
        load_rows(source)


def test_unknown_split_of_easy_vqa_is_explained():
    with pytest.raises(ValueError, match="train, test, got 'validation'"):
        load_rows("easy_vqa", "validation")
