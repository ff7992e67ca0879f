"""Evaluation of what is no evaluation: no rows, lists of unequal length, answers that are no text."""

import evaluate
import pytest
from datasets import Dataset

from hf_moe.evaluation.metrics import metric_path
from hf_moe.evaluation.scoring import exact_match_score, mean_scores, score_answers, vqa_score
from hf_moe.evaluation.vqa import check_references, evaluate_vqa, predict_answers, reference_answers


SCORES = [vqa_score, exact_match_score]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("prediction", "references", "message"),
    [
        (None, "yes", "prediction None is no text but NoneType"),
        (3, "3", "prediction 3 is no text but int"),
        (["yes"], "yes", "no text but list"),
        ("yes", 3, "got 3"),
        ("yes", None, "got None"),
        ("yes", {"yes"}, "got {'yes'}"),
        ("yes", [], r"got \[\]"),
        ("yes", ["yes", 1], "reference 1 is no text but int"),
        ("yes", [["yes"]], "no text but list"),
    ],
)
def test_an_answer_that_is_no_text_is_refused_with_its_value(score, prediction, references, message):
    with pytest.raises(ValueError, match=message):
        score(prediction, references)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("predictions", "references", "types", "message"),
    [
        (["a", "b"], ["a"], None, "2 predictions and 1 references"),
        ([], [], None, "no answers"),
        ("ab", ["a", "b"], None, "got text"),
        (["a"], "a", None, "got text"),
        (["a", 3], ["a", "b"], None, "Answer 1: the prediction 3"),
        (["a"], ["a"], ["x", "y"], "1 answers and 2 question types"),
    ],
)
def test_lists_that_do_not_fit_are_refused(score, predictions, references, types, message):
    with pytest.raises(ValueError, match=message):
        score_answers(score, predictions, references, types)


def test_a_question_without_a_type_counts_in_the_mean_alone():
    result = mean_scores([1.0, 0.0, 1.0], "accuracy", ["shape", None, 3])
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["accuracy_by_question_type"] == {"3": 1.0, "shape": 1.0}


@pytest.mark.parametrize("name", ["exact_match", "vqa_accuracy"])
def test_metric_modules_refuse_what_does_not_fit(name):
    metric = evaluate.load(metric_path(name))
    with pytest.raises(ValueError):
        metric.compute(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="question types"):
        metric.compute(predictions=["a"], references=["a"], question_types=["x", "y"])
    with pytest.raises(ValueError):
        metric.compute(predictions=["a"], references=[[]])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": 7}, ["7"]),
        ({"answer": 0}, ["0"]),
        ({"answer": False}, ["False"]),
        ({"answer": 1.5}, ["1.5"]),
        ({"answers": [1, "one"]}, ["1", "one"]),
        ({"answers": "yes"}, ["yes"]),
        ({"answers": [], "answer": "no"}, ["no"]),
        ({"answers": None, "answer": "007"}, ["007"]),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": 3}]}, ["3"]),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no"}]}, ["no"]),
    ],
)
def test_right_answers_are_text_as_they_were_written(row, expected):
    assert reference_answers(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": {"text": "a"}}, "answer={'text': 'a'}"),
        ({"answers": [["a"]]}, r"answer=\['a'\]"),
        ({"answers": ["a", None]}, "answer=None"),
        ({"answer": float("nan")}, "answer=nan"),
        ({}, "no conversation"),
        ({"messages": []}, "message|conversation|answer"),
        ({"messages": [{"role": "user", "content": "?"}]}, "needs a column answer"),
    ],
)
def test_what_is_no_answer_is_refused_by_its_row(row, message):
    with pytest.raises(ValueError, match=message):
        reference_answers(row)
    good = {"answer": "a"}
    rows = [good, {**row, "id": "odd"}]
    with pytest.raises(ValueError, match=r"Row 1 of the dataset \(id 'odd'\)"):
        check_references(rows)


def test_no_rows_are_refused(vlm, processor, questions):
    empty = questions.select([])
    with pytest.raises(ValueError, match="no rows"):
        evaluate_vqa(vlm, processor, empty)
    with pytest.raises(ValueError, match="no rows"):
        predict_answers(vlm, processor, questions.to_iterable_dataset().filter(lambda row: False), candidates=["a"])


def test_answers_that_are_numbers_are_scored(vlm, processor, questions):
    counted = Dataset.from_list([{**row, "answer": index} for index, row in enumerate(questions)])
    assert evaluate_vqa(vlm, processor, counted, max_new_tokens=1)["count"] == 2
