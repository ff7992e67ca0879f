"""VQA accuracy, for `evaluate`."""

import datasets
import evaluate

from hf_moe.evaluation.scoring import score_answers, vqa_score


_DESCRIPTION = """VQA accuracy: min(humans who gave the answer / 3, 1) after the standard answer normalisation."""

_INPUTS_DESCRIPTION = """
Args:
    predictions (list of str): one answer per question.
    references (list of str, or list of lists of str): the right answer, or the answers of several humans.
    question_types (list of str, *optional*): for means by question type.
Returns:
    `accuracy` (0 to 1), `count`, and with question types `accuracy_by_question_type`.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        answer = datasets.Value("string")
        several = datasets.Features({"predictions": answer, "references": datasets.List(answer)})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="VQA: Visual Question Answering (arXiv:1505.00468)",
            inputs_description=_INPUTS_DESCRIPTION,
            features=[several, datasets.Features({"predictions": answer, "references": answer})],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        question_types: list[str] | None = None,
    ) -> dict:
        return score_answers(vqa_score, predictions, references, question_types, "accuracy")
