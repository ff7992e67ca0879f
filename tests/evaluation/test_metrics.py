"""Answer normalisation, VQA accuracy, exact match and their `evaluate` modules."""

import evaluate
import pytest

from hf_moe.evaluation.metrics import metric_path
from hf_moe.evaluation.scoring import exact_match_score, mean_scores, normalise_answer, vqa_score


@pytest.mark.parametrize(
    "answer, normalised",
    [
        ("Yes.", "yes"),
        ("  The\tred\ncircle! ", "red circle"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("Don't know", "don't know"),
        ("1,000", "1000"),
        ("3.5 cm", "3.5 cm"),
        ("U.S.", "us"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well-known", "well known"),
    ],
)
def test_answers_are_normalised_as_vqa_does(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize("agreeing, score", [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (10, 1.0)])
def test_three_of_ten_humans_make_an_answer_right(agreeing, score):
    references = ["Yes"] * agreeing + ["no"] * (10 - agreeing)
    assert vqa_score("yes.", references) == pytest.approx(score)


def test_few_references_must_all_agree():
    assert vqa_score("the circle", "circle") == 1.0
    assert vqa_score("circle", ["circle", "ring"]) == 0.5
    assert vqa_score("square", ["circle"]) == 0.0


def test_exact_match_forgives_only_white_space_around():
    assert exact_match_score(" red ", "red") == 1.0
    assert exact_match_score("red", ["blue", "red"]) == 1.0
    assert exact_match_score("Red", "red") == 0.0


def test_means_by_question_type():
    result = mean_scores([1.0, 0.0, 1.0], "accuracy", ["shape", "color", "color"])
    assert result == {
        "accuracy": pytest.approx(2 / 3),
        "count": 3,
        "accuracy_by_question_type": {"color": 0.5, "shape": 1.0},
    }
    with pytest.raises(ValueError, match="no answers"):
        mean_scores([], "accuracy")
    with pytest.raises(ValueError):
        mean_scores([1.0], "accuracy", ["a", "b"])


def test_metrics_load_from_their_folders():
    accuracy = evaluate.load(metric_path("vqa_accuracy"))
    asked = {"predictions": ["Yes", "two"], "question_types": ["yes/no", "count"]}
    expected = {"accuracy": 1.0, "count": 2, "accuracy_by_question_type": {"yes/no": 1.0, "count": 1.0}}
    assert accuracy.compute(references=["yes", "2"], **asked) == expected
    several = accuracy.compute(predictions=["red"], references=[["red", "blue", "red", "blue"]])
    assert several == {"accuracy": pytest.approx(2 / 3), "count": 1}
    exact = evaluate.load(metric_path("exact_match"))
    assert exact.compute(predictions=["Yes", "no"], references=["yes", "no"])["exact_match"] == 0.5


def test_unknown_metric_is_explained():
    with pytest.raises(ValueError, match="exact_match, vqa_accuracy"):
        metric_path("bleu")
