"""Exact match, for `evaluate`."""

import datasets
import evaluate

from hf_moe.evaluation.scoring import exact_match_score, score_answers


_DESCRIPTION = """The share of answers that equal a reference, except for white space around them."""

_INPUTS_DESCRIPTION = """
Args:
    predictions (list of str): one answer per question.
    references (list of str, or list of lists of str): the right answer, or the answers of several humans.
    question_types (list of str, *optional*): for means by question type.
Returns:
    `exact_match` (0 to 1), `count`, and with question types `exact_match_by_question_type`.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        answer = datasets.Value("string")
        several = datasets.Features({"predictions": answer, "references": datasets.List(answer)})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=[several, datasets.Features({"predictions": answer, "references": answer})],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        question_types: list[str] | None = None,
    ) -> dict:
        return score_answers(exact_match_score, predictions, references, question_types, "exact_match")
