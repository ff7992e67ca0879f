"""Malformed rows: each is refused with its place, or read as anyone would read it."""

import copy
import json

import pytest
from datasets import Dataset

from hf_moe.data import VisionLanguageCollator, load_rows, tokenize_rows


GOOD = {
    "messages": [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "circle"}],
    "images": ["a.png"],
}


def changed(*path, to):
    """Return the good row with another value somewhere within it."""
    row = copy.deepcopy(GOOD)
    place = row
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return row


def message(index, value):
    return changed("messages", index, to=value)


def content(index, value):
    return changed("messages", index, "content", to=value)


def part(value):
    return content(0, [value])


USER, ASSISTANT = GOOD["messages"]
WRONG_TYPES = [None, 5, True, "x", "", [], {}, [None], [5], ["x"], [[]], [{}], {"a": 1}]
MALFORMED = [
    *((changed("messages", to=value), "messages|message 0|conversation") for value in WRONG_TYPES),
    *((message(1, value), "message 1") for value in WRONG_TYPES),
    *((changed("messages", 1, "role", to=value), "message 1") for value in (None, 5, "", [], "User", "gpt")),
    (changed("messages", 1, "role", to="asistant"), "Did you mean 'assistant'"),
    *((content(0, value), "message 0") for value in (None, [], {}, [None], ["x"], [{}])),
    *((content(1, value), "message 1") for value in (None, [], {}, [None], ["x"], [{}])),
    *((part(value), "message 0") for value in (None, 5, "x", {"type": 5}, {"text": "x"}, {"type": "sound"})),
    (part({"type": "video"}), "1 videos, and HfMoeProcessor takes images"),
    *((part({"type": "text", "text": value}), "text of message 0") for value in (None, [], {}, ["x"])),
    (content(1, "\ud800"), "Unicode"),
    (content(1, [{"type": "image"}]), "message 1, an assistant turn"),
    (changed("messages", to=[ASSISTANT, USER]), "begins with an assistant turn"),
    (changed("messages", to=[ASSISTANT]), "begins with an assistant turn"),
    (changed("messages", to=[USER]), "no assistant token to learn"),
    (part({"type": "image", "image": "a.png"}), "1 of which bring their image, and 1 images beside"),
    (changed("images", to=[None]), "image 0 among its 1 images"),
    (part({"type": "image"}) | {"images": ["a.png"] * 3}, "1 <image> placeholders and 3 images"),
    (changed("tools", to=5), "tools=5"),
    (changed("tools", to="{"), "tools, which is not JSON"),
    (changed("chat_template_kwargs", to=[1]), r"chat_template_kwargs=\[1\]"),
    (changed("input_ids", to="x"), "input_ids='x'"),
    (changed("labels", to=[1]), "labels and no input_ids"),
    ({}, "empty|no conversation"),
    ({"question": "what ?", "answer": None}, "no conversation"),
    ({"question": "what ?", "answer": ["x"]}, "answer=.*list"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "'robot'; roles are human, gpt"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "message 0"),
    *((value, "object with 'messages'") for value in (None, 5, "x", [], [GOOD], True)),
]  # fmt: skip


def read_whole(rows, processor):
    """Read rows as training does: load, tokenise, collate."""
    rows = load_rows(rows)
    VisionLanguageCollator(processor)(list(rows))
    tokenize_rows(rows, processor)


@pytest.mark.parametrize("row, said", MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_row_is_named(row, said, processor, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save("a.png")
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, (GOOD, row))))
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, row]))
    for source in ("rows.jsonl", "rows.json", [GOOD, row]):
        with pytest.raises(ValueError, match=rf"(?s)Row 1 of .*({said})"):
            read_whole(source, processor)
    with pytest.raises(ValueError, match=rf"(?s)Row 1 of the batch .*({said})"):
        VisionLanguageCollator(processor)([GOOD, row])


HARMLESS = [
    (content(1, 5), "5"), (content(1, 0), "0"), (content(1, ""), ""), (content(1, [{"type": "text", "text": 5}]), "5"),
    (changed("images", to=None), "circle"), (changed("images", to=[]), "circle"),
    (changed("images", to="a.png"), "circle"),
    (changed("images", to=["a.png", "a.png"]), "circle"), (changed("messages", 0, "content", to=5), "circle"),
    (changed("messages", 1, "tool_calls", to=[]), "circle"), (changed("messages", 1, "name", to=None), "circle"),
    (changed("messages", to=[*GOOD["messages"], USER]), "circle"), (changed("id", to=10**400), "circle"),
]  # fmt: skip


@pytest.mark.parametrize("row, answer", HARMLESS, ids=lambda value: str(value)[:40])
def test_odd_row_is_read_as_anyone_would(row, answer, processor, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save("a.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (GOOD, row))))
    processor.tokenizer.add_tokens(["0", "5"])
    for source in ("rows.jsonl", [GOOD, row]):
        labels = VisionLanguageCollator(processor)(list(load_rows(source)))["labels"][1]
        assert processor.tokenizer.decode(labels[labels != -100]) == f"{answer} </s>".strip()


LINE = json.dumps(GOOD).encode()
FILES = {
    "jsonl": [
        (LINE + b"\n" + LINE.replace(b"circle", b"caf\xe9"), "Row 1 of .*line 2 is not UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "Row 0 of .*line 1 is not UTF-8"),
        (LINE + b"\n{", "Row 1 of .*cannot be read"),
        (LINE + b",", "Row 0 of .*Extra data"),
        (b"\x00", "Row 0 of"),
        (b'{"messages": 1, "messages": []}', "Row 0 of .*'messages' occurs twice"),
        (b'{"messages": NaN}', "Row 0 of .*NaN is not JSON"),
        (b"[" * 100_000, "Row 0 of .*recursion"),
        (b"", "holds no rows"),
        (b"\r\n \n", "holds no rows"),
        (b"[" + LINE + b"]", "Row 0 of .*a row is an object"),
    ],
    "json": [
        (LINE, "holds an object"),
        (b"[" + LINE + b", 5]", "Row 1 of .*element 1 holds a number"),
        (b"5", "holds a number"),
        (b"[]", "holds no rows"),
        (b"", "holds no rows"),
        (b"\n\n[\xff]", "line 3 is not UTF-8"),
    ],
    "csv": [
        (b"", "holds no rows"),
        (b"question,answer\n", "holds no rows"),
        (b"question,answer\na,b,c\n", "Row 0 of .*3 cells for the 2 columns"),
        (b"question,answer\na,b\nc\n", "Row 1 of .*1 cells for the 2 columns"),
        (b"question,question\na,b\n", "each column needs a name of its own"),
        (b"question,answer\na,b\nc,\xff\n", "line 3 is not UTF-8"),
        (b"question,answer\na,b\nc,\n", "Row 1 of .*no conversation"),
        (b'question,answer\na,"b\n', "Row 0 of"),
    ],
    "parquet": [(b"PAR1", "cannot be read"), (b"", "cannot be read")],
    "arrow": [(b"ARROW1", "cannot be read"), (b"", "cannot be read")],
    "txt": [(b"what", "no file of rows that can be read: rows are read from .jsonl")],
}


@pytest.mark.parametrize("suffix, raw, said", [(suffix, *case) for suffix, cases in FILES.items() for case in cases])
def test_malformed_file_is_named(suffix, raw, said, picture, tmp_path):
    picture(0).save(tmp_path / "a.png")
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"(?s){said}") as caught:
        load_rows(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf" + LINE, LINE + b"\r\n" + LINE + b"\r\n", b"\n" + LINE])
def test_marks_and_line_ends_of_other_systems_are_read(raw, picture, tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_bytes(raw)
    assert load_rows(str(tmp_path / "rows.jsonl"))[0]["messages"][1]["content"][0]["text"] == "circle"


def test_column_of_several_types_is_named(tmp_path, picture):
    picture(0).save(tmp_path / "a.png")
    rows = [{**GOOD, "level": 1}, GOOD, {**GOOD, "level": "high"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"Row 2 of .*rows.jsonl has level='high', and a row before it level=1"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_streamed_rows_are_named(processor):
    rows = Dataset.from_list([{"messages": GOOD["messages"]}, {"messages": [USER]}]).to_iterable_dataset()
    broken = rows.map(lambda row: row)
    assert list(broken)
    with pytest.raises(ValueError, match="Row 1 of the batch"):
        VisionLanguageCollator(processor)(list(rows))
