"""The forms in which a row may be written, and the fields that are used or refused by name."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_moe.data import TextProcessor, VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.rows import row_media, row_messages


QUESTION, ANSWER = "what is this ?", "circle"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
TOOL_CALLS = [{"function": {"name": "look", "arguments": {"at": "this"}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }} {{ message.content }} "
    "{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }} "
    "{% endfor %}{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def question(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}, ASSISTANT]


FORMS = {
    "parts": lambda image, path: {"messages": question({"type": "image"}), "images": [image]},
    "texts": lambda image, path: {"messages": [USER, ASSISTANT], "images": [image]},
    "one image": lambda image, path: {"messages": [USER, ASSISTANT], "image": image},
    "one of images": lambda image, path: {"messages": [USER, ASSISTANT], "images": path},
    "placeholder in the text": lambda image, path: {
        "messages": [{"role": "user", "content": f"<image>{QUESTION}"}, ASSISTANT], "images": [image],
    },
    "from and value": lambda image, path: {
        "conversations": [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        "image": image,
    },
    "image in its part": lambda image, path: {"messages": question({"type": "image", "image": image})},
    "path in its part": lambda image, path: {"messages": question({"type": "image", "path": path})},
    "image_url": lambda image, path: {"messages": question({"type": "image_url", "image_url": {"url": path}})},
    "base64": lambda image, path: {
        "messages": question({"type": "image", "base64": base64.b64encode(png(image)).decode()}),
    },
    "question and answer": lambda image, path: {"question": QUESTION, "answer": ANSWER, "images": [image]},
    "JSON text": lambda image, path: {"messages": json.dumps([USER, ASSISTANT]), "images": [image]},
    "arrays": lambda image, path: {"messages": np.array([USER, ASSISTANT], dtype=object), "images": (image,)},
    "filled by Arrow": lambda image, path: {
        "messages": [{**turn, "tool_calls": None, "name": None} for turn in (USER, ASSISTANT)],
        "images": [image], "weight": None, "conversations": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_row_give_the_same_batch(form, processor, picture, tmp_path):
    picture(0).save(tmp_path / "a.png")
    row = FORMS[form](picture(0), str(tmp_path / "a.png"))
    batch, expected = (VisionLanguageCollator(processor)([each]) for each in (row, FORMS["parts"](picture(0), "")))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("arrays", "image in its part")])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_all_forms_of_a_row_are_read_from_files(form, suffix, processor, picture, tmp_path):
    picture(0).save(tmp_path / "a.png")
    row = json.dumps(FORMS[form](picture(0), "a.png"), default=lambda image: "a.png")
    (tmp_path / f"rows.{suffix}").write_text(row if suffix == "jsonl" else f"[{row}]")
    batch = VisionLanguageCollator(processor)(list(load_rows(str(tmp_path / f"rows.{suffix}"))))
    expected = VisionLanguageCollator(processor)([FORMS["parts"](picture(0), "")])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_of_parts_and_of_the_row_keep_their_places(picture):
    first, second = picture(0), picture(1)
    row = {"messages": question({"type": "image"}, {"type": "image", "image": second}), "images": [first]}
    assert row_media(row, "image") == [first, second]
    with pytest.raises(ValueError, match="2 image parts, 1 of which bring their image, and 2 images"):
        row_media({**row, "images": [first, second]}, "image")


FIELDS = {
    "tool_calls": TOOL_CALLS, "tool_call": TOOL_CALLS[0], "reasoning_content": "red", "thinking": "red",
    "name": "this",
    "weight": 0, "train": False, "function_call": {"name": "look"}, "prefix": True, "anything": "else",
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("train", [True, False])
def test_field_that_the_template_ignores_is_refused(field, train, processor):
    row = {"messages": [USER, {**ASSISTANT, field: FIELDS[field]}]}
    with pytest.raises(ValueError, match=rf"Row 1 of the batch has {field}=.* in message 1, which the chat template"):
        VisionLanguageCollator(processor, train=train)([{"messages": [USER, ASSISTANT]}, row])
    with pytest.raises(ValueError, match=rf"Row 0 of the dataset has {field}=.* in message 1"):
        tokenize_rows(Dataset.from_list([row]), processor)


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "tool_calls"])
def test_field_that_the_template_reads_is_learnt(field, processor):
    processor.chat_template = processor.chat_template.replace(
        "{% if message.role == 'assistant' %}</s>",
        f"{{{{ message.{field} or '' }}}} {{% if message.role == 'assistant' %}}</s>",
    )
    processor.tokenizer.add_tokens([str(FIELDS[field])])
    batch = VisionLanguageCollator(processor)([{"messages": [USER, {**ASSISTANT, field: FIELDS[field] or "red"}]}])
    assert len(batch["labels"][batch["labels"] != -100]) > 2


def test_tools_and_their_calls_are_rendered_and_learnt(processor):
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["look", '{"at":', '"this"}'])
    tokenizer.chat_template = TOOL_TEMPLATE
    row = {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": TOOL_CALLS}],
        "tools": [{"name": "look"}],
    }
    for each in (row, {**row, "tools": json.dumps(row["tools"])}, Dataset.from_list([row])[0]):
        batch = VisionLanguageCollator(TextProcessor(tokenizer))([each])
        assert tokenizer.decode(batch["input_ids"][0][:2]) == "look user"
        assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == 'look {"at": "this"} </s>'
    del row["tools"]
    null = {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS}
    batch = VisionLanguageCollator(TextProcessor(tokenizer))([{"messages": [USER, null]}])
    assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == 'look {"at": "this"} </s>'


COLUMNS = {
    "tools": ([{"name": "look"}], "tools=.* which the chat template does not read"),
    "chat_template_kwargs": ({"style": "short"}, "style='short', which the chat template does not read"),
    "weight": (0.5, "weight=0.5, which training would ignore"),
    "sample_weight": (2, "sample_weight=2"),
    "loss_mask": ([0, 1], "loss_mask="),
    "train_on_turn": ([False], "train_on_turn="),
    "system": ("be brief", "system='be brief'"),
    "videos": (["a.mp4"], "1 videos, and HfMoeProcessor takes images"),
    "video_path": ("a.mp4", "video_path="),
    "functions": ([{}], "functions="),
    "labels": ([1, 2], "labels and no input_ids"),
    "conversations": ([{"from": "human", "value": "?"}], "both 'messages' and 'conversations'"),
    "image": ("a.png", "both 'images' and 'image'"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_column_that_would_be_ignored_is_refused(column, processor, picture):
    value, message = COLUMNS[column]
    row = {"messages": [USER, ASSISTANT], "images": [picture(0)], column: value}
    with pytest.raises(ValueError, match=f"Row 0 of the batch has {message}"):
        VisionLanguageCollator(processor)([row])


def test_other_columns_are_announced_once(processor, caplog):
    collator = VisionLanguageCollator(processor)
    for _ in range(2):
        collator([{"messages": [USER, ASSISTANT], "level": 3, "task_ids": 1, "id": "a", "question_type": "shape"}])
    assert [record.getMessage() for record in caplog.records] == [
        "Training does not read the columns level of the rows."
    ]


def test_extra_key_of_a_part_is_refused_or_read(processor):
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "is", "look": "red"}]}, ASSISTANT]}
    with pytest.raises(ValueError, match="look='red' in a part of message 0"):
        VisionLanguageCollator(processor)([row])
    processor.chat_template = processor.chat_template.replace("part.text }}", "part.text ~ ' ' ~ (part.look or '') }}")
    batch = VisionLanguageCollator(processor)([row])
    assert processor.tokenizer.decode(batch["input_ids"][0][:4]) == "<s> user is red"


def test_template_that_raises_names_the_row(processor):
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match="Row 0 of the batch .*user, assistant.*: TemplateError: roles must alternate"
    ):
        VisionLanguageCollator(processor)([{"messages": [USER, ASSISTANT]}])


def test_prompt_with_other_ids_than_its_text_is_refused(processor, monkeypatch):
    monkeypatch.setattr(
        processor, "apply_chat_template", lambda *_, tokenize=False, **__: {"input_ids": [[7]]} if tokenize else "this"
    )
    with pytest.raises(ValueError, match="gives the prompt 'this' other ids than its tokenizer"):
        VisionLanguageCollator(processor)


@pytest.mark.parametrize("names", [(), ("input_ids", "labels")])
def test_columns_that_trainer_drops_are_explained(names, processor, rows):
    tokenized = tokenize_rows(Dataset.from_list([rows[0]]), processor)
    kept = {name: tokenized[0][name] for name in names}
    with pytest.raises(ValueError, match="Row 0 of the batch .*remove_unused_columns=False"):
        VisionLanguageCollator(processor)([kept])


@pytest.mark.parametrize("style", ["torch", "numpy"])
def test_tokenised_rows_may_be_tensors(style, processor, rows):
    tokenized = tokenize_rows(Dataset.from_list([rows[1]]), processor)
    batch = VisionLanguageCollator(processor)(
        list(tokenized.remove_columns(["images", "image_id"]).with_format(style))
    )
    assert torch.equal(batch["labels"], VisionLanguageCollator(processor)(rows[1:2])["labels"])


def test_answers_are_read_as_they_are_written(processor):
    for answer, text in ((0, "0"), (False, "False"), (1.5, "1.5"), (np.int64(7), "7"), ("007", "007"), ("", "")):
        message = row_messages({"question": QUESTION, "answer": answer})[1]
        assert message["content"] == [{"type": "text", "text": text}]
    with pytest.raises(ValueError, match="answer=nan of type float"):
        row_messages({"question": QUESTION, "answer": float("nan")})
