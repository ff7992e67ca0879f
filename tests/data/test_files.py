"""Files and folders of rows: every format, every column, and values as they are written."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from transformers.utils import logging

from hf_moe.data import VisionLanguageCollator, load_rows
from hf_moe.data.rows import row_messages, template_options
from hf_moe.evaluation.vqa import reference_answers


TURNS = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "circle"}]
WRITTEN = ["007", "1.50", "True", "NA", "null", "None", "1e3", "0", "2020-01-01", " 1", "1,000", "-0.0", "inf", "nan"]
LEXEMES = ["7", "1.50", "true", "false", "1e3", "1E+2", "0", "-0.0", "1.0", "100000000000000000000", "0.1000"]


def answers(rows):
    """Return what is trained and what is scored."""
    trained = ["".join(part["text"] for part in row["messages"][-1]["content"]) for row in rows]
    assert trained == [reference_answers(row)[0] for row in rows]
    return trained


def write_table(rows, file):
    """Write rows as Parquet or Arrow, which hold `None` where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.fixture
def folder(tmp_path, picture):
    picture(0).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_answers_of_tables_are_the_text_as_written(folder, suffix, delimiter):
    lines = [["question", "answer", "image"], *(["what ?", f'"{answer}"', "a.png"] for answer in WRITTEN)]
    (folder / f"rows.{suffix}").write_text("\n".join(map(delimiter.join, lines)))
    assert answers(load_rows(str(folder / f"rows.{suffix}"))) == WRITTEN


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("form", ["answer", "content", "part", "value"])
def test_numbers_of_json_are_the_text_as_written(folder, suffix, form):
    rows = {
        "answer": '{"question": "what ?", "answer": %s}',
        "content": '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": %s}]}',
        "part": '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": '
        '[{"type": "text", "text": %s}]}]}',
        "value": '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": %s}]}',
    }
    lines = [rows[form] % lexeme for lexeme in LEXEMES]
    text = "\n".join(lines) if suffix == "jsonl" else "[" + ",".join(lines) + "]"
    (folder / f"rows.{suffix}").write_text(text)
    assert answers(load_rows(str(folder / f"rows.{suffix}"))) == LEXEMES


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("column", ["answer", "text"])
def test_answers_of_image_folders_are_the_text_as_written(tmp_path, picture, name, column):
    wanted = WRITTEN if name.endswith("csv") else LEXEMES
    for index, _ in enumerate(wanted):
        picture(index).save(tmp_path / f"{index:02}.png")
    if name.endswith("csv"):
        lines = [f"file_name,{column}", *(f'{index:02}.png,"{answer}"' for index, answer in enumerate(wanted))]
    else:
        lines = [f'{{"file_name": "{index:02}.png", "{column}": {answer}}}' for index, answer in enumerate(wanted)]
    (tmp_path / name).write_text("\n".join(lines))
    rows = load_rows({"image_folder": str(tmp_path), "question": "what ?"})
    assert dict(zip(rows["image_id"], answers(rows), strict=True)) == {
        f"{index:02}.png": answer for index, answer in enumerate(wanted)
    }


@pytest.mark.parametrize(
    "line, said", [("a.png,", "a.png has no answer"), ("lost.png,red", "Row 0 of .*metadata.csv has no image")]
)
def test_metadata_that_does_not_fit_are_named(folder, line, said):
    (folder / "metadata.csv").write_text(f"file_name,answer\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_rows({"image_folder": str(folder), "question": "what ?"})


def test_image_that_metadata_leave_out_is_announced(folder, picture, caplog):
    picture(1).save(folder / "b.png")
    (folder / "metadata.csv").write_text("file_name,answer\na.png,red\n")
    assert len(load_rows({"image_folder": str(folder), "question": "what ?"})) == 1
    assert "1 images" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "list"])
def test_columns_of_all_rows_are_kept(folder, suffix):
    rows = [
        {"messages": TURNS, "image": str(folder / "a.png")},
        {"messages": TURNS, "level": 3, "extra": {"a": 1}, "tools": [{"name": "f"}]},
        {"messages": TURNS, "extra": {"b": "x"}, "question_type": "shape"},
    ]
    file = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix in ("parquet", "arrow"):
        write_table(rows, file)
    loaded = load_rows(rows if suffix == "list" else str(file))
    assert {"level", "extra", "question_type", "tools"} <= set(loaded.column_names)
    assert loaded["level"][:] == [None, 3, None]
    assert json.loads(loaded["tools"][1]) == [{"name": "f"}]
    assert len(loaded[0]["images"]) == 1 and loaded[1]["images"] == []


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "list"])
def test_fields_of_single_messages_are_kept(folder, suffix, processor):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "look", "arguments": {"at": "1"}}}],
    }
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "look", "arguments": {"by": "x"}}}],
    }
    rows = [{"messages": TURNS}, {"messages": [TURNS[0], call]}, {"messages": [TURNS[0], other]}]
    file = folder / f"rows.{suffix}"
    if suffix in ("parquet", "arrow"):
        write_table(rows, file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    loaded = load_rows(rows if suffix == "list" else str(file))
    assert [row_messages(row)[1].get("tool_calls") for row in loaded] == [
        None,
        call["tool_calls"],
        other["tool_calls"],
    ]
    with pytest.raises(ValueError, match="Row 1 of the batch .*tool_calls=.* in message 1"):
        VisionLanguageCollator(processor)(list(loaded))


NULLS = [
    {"role": "user", "content": "what is this ?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"at": None}}}]},
]
NULL_TOOLS = [{"name": "f", "parameters": {"at": {"default": None}}}]


def nulls_of(row):
    """Return what the row gives the template for the null in a call's arguments and in a tool."""
    call = row_messages(row)[1]["tool_calls"][0]["function"]
    return call.get("arguments"), template_options(row)["tools"][0]["parameters"]["at"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet of text", "list of text", "dataset of text"])
def test_null_that_is_written_is_kept(tmp_path, suffix, caplog):
    row = {"messages": NULLS, "tools": NULL_TOOLS}
    if "text" in suffix:
        row = {name: json.dumps(value) for name, value in row.items()}
    file = tmp_path / f"rows.{suffix.split()[0]}"
    if suffix.startswith("json"):
        file.write_text(json.dumps(row if suffix == "jsonl" else [row]))
    elif suffix.startswith("parquet"):
        write_table([row], file)
    rows = Dataset.from_list([row]) if "dataset" in suffix else load_rows([row] if "list" in suffix else str(file))
    assert nulls_of(rows[0]) == ({"at": None}, {"default": None})
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "list", "dataset"])
def test_null_that_a_table_may_have_filled_in_is_left_out_aloud(tmp_path, suffix, caplog):
    logging.get_logger().warning_once.cache_clear()
    rows, file = [{"messages": NULLS, "tools": NULL_TOOLS}], tmp_path / f"rows.{suffix}"
    if suffix in ("parquet", "arrow"):
        write_table(rows, file)
    loaded = Dataset.from_list(rows) if suffix == "dataset" else load_rows(rows if suffix == "list" else str(file))
    for _ in range(2):
        assert nulls_of(loaded[0]) == ({}, {})
    said = sorted(record.getMessage().partition(" are left out")[0] for record in caplog.records)
    assert said == ["Nulls within the tool_calls of messages", "Nulls within the tools"]


@pytest.mark.parametrize("kind", ["dataset", "splits"])
def test_saved_datasets_are_loaded(folder, kind):
    rows = Dataset.from_list([{"messages": TURNS}])
    (rows if kind == "dataset" else DatasetDict({"train": rows})).save_to_disk(folder / "saved")
    assert len(load_rows(str(folder / "saved"))) == 1
    if kind == "splits":
        with pytest.raises(ValueError, match="has the splits train, got 'test'"):
            load_rows(str(folder / "saved"), "test")


def test_folder_of_files_is_read_by_split(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\nwhat ?,007\n")
    assert answers(load_rows(str(tmp_path))) == ["007"]
    assert answers(load_rows({"path": str(tmp_path)})) == ["007"]
    assert load_rows({"hub": str(tmp_path)})[0]["answer"] == "007"
    with pytest.raises(FileNotFoundError, match="no.* one file of rows named 'test'; it has train.csv"):
        load_rows(str(tmp_path), "test")


@pytest.mark.parametrize(
    "source",
    [
        "rows/train.json",
        "rows/train.parquet",
        "./rows",
        "../rows",
        "~/no/rows",
        "/no/where",
        "a/b/c",
        "data\\rows",
        "rows.csv",
    ],
)
@pytest.mark.parametrize("key", [None, "hub", "path"])
def test_path_that_is_not_there_is_no_dataset_of_the_hub(source, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_moe.data.sources.load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="(?s)There is no f"):
        load_rows(source if key is None else {key: source})


def test_dataset_out_of_reach_says_what_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder pictures/train, nor .*a folder of images, "):
        load_rows("pictures/train")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"limit": "3"}, "limit='3' .* of type str, not int"),
        ({"limit": 0}, "limit=0 .* leaves none"),
        ({"limit": True}, "limit=True"),
        ({"shuffle": "yes"}, "shuffle='yes'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"where": ["a"]}, "where="),
        ({"where": {"lost": 1}}, "where: there is no column 'lost'; the rows have"),
        ({"ignore": ["lost"]}, "ignore: there is no column 'lost'"),
        ({"ignore": "level"}, "ignore='level'"),
        ({"path": 5}, "path=5"),
        ({"path": None}, "path=None"),
    ],
)
def test_wrong_option_of_a_source_is_named(options, said, folder):
    (folder / "rows.jsonl").write_text(json.dumps({"messages": TURNS}))
    with pytest.raises(ValueError, match=said):
        load_rows({"path": str(folder / "rows.jsonl"), **options})


@pytest.mark.parametrize("source", [None, 5, True, [], ()])
def test_source_of_another_type_is_named(source):
    with pytest.raises(ValueError, match="A source of rows is|The list holds no rows"):
        load_rows(source)


def test_ignored_columns_are_dropped(folder, processor):
    (folder / "rows.jsonl").write_text(json.dumps({"messages": TURNS, "weight": 0.5}))
    source = {"path": str(folder / "rows.jsonl")}
    with pytest.raises(ValueError, match="weight=0.5"):
        VisionLanguageCollator(processor)(list(load_rows(source)))
    assert VisionLanguageCollator(processor)(list(load_rows({**source, "ignore": ["weight"]})))
