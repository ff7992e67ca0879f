"""Two tasks that contradict each other, and rows of text for models that have no processor."""

import pytest

from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.data import TextProcessor, VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.opposite_tasks import questions
from hf_moe.data.rows import question_messages
from hf_moe.data.tokenisation import IGNORE_INDEX


@pytest.fixture(scope="module")
def text_processor():
    rows = load_rows("opposite_tasks")
    return TextProcessor(train_word_tokenizer(turn["content"][0]["text"] for row in rows for turn in row["messages"]))


def test_the_tasks_contradict_each_other_and_the_test_words_are_new():
    train, test = (set(questions(split)) for split in ("train", "test"))
    assert len(train) == 192 and len(test) == 96
    words = [{question.split()[2] for question, _ in part} for part in (train, test)]
    assert not words[0] & words[1] and len(words[1]) == 48
    assert sum(truth for _, truth in test) == 48
    source = {"name": "opposite_tasks"}
    parts = [load_rows({**source, "where": {"question_type": task}}, "test") for task in ("truth", "lie")]
    for truth, lie in zip(*parts, strict=True):
        assert truth["messages"][1] == lie["messages"][1] and {truth["answer"], lie["answer"]} == {"yes", "no"}
        assert (truth["task_ids"], lie["task_ids"]) == (0, 1)


def test_only_rows_with_the_wanted_value_are_loaded_before_they_are_limited():
    rows = load_rows({"name": "opposite_tasks", "where": {"answer": "no", "task_ids": 1}, "limit": 5})
    assert set(rows["answer"]) == {"no"} and set(rows["task_ids"]) == {1} and len(rows) == 5
    with pytest.raises(ValueError, match="no column 'tusk'; the rows have messages"):
        load_rows({"name": "opposite_tasks", "where": {"tusk": 1}})
    with pytest.raises(ValueError, match="No row has"):
        load_rows({"name": "opposite_tasks", "where": {"answer": "maybe"}})


def test_a_tokenizer_alone_makes_batches_with_conditions_and_without_modalities(text_processor):
    rows = tokenize_rows(load_rows({"name": "opposite_tasks", "limit": 2}), text_processor)
    batch = VisionLanguageCollator(text_processor, conditions=["task"])(list(rows))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "task_ids"}
    assert batch["task_ids"].tolist() == [0, 1]
    learnt = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert text_processor.tokenizer.decode(learnt).split() == ["yes", "<|end|>"]


def test_an_image_before_a_model_of_text_is_refused(text_processor):
    row = {"messages": question_messages("what is this ?", "circle"), "images": ["a.png"]}
    with pytest.raises(ValueError, match="Row 0 of the batch has an image, and this model reads text alone"):
        VisionLanguageCollator(text_processor)([row])
