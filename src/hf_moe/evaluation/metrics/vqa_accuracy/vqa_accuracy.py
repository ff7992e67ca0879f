"""VQA accuracy, for `evaluate`."""

from typing import Any

import evaluate

from hf_moe.evaluation.metrics import metric_info
from hf_moe.evaluation.scoring import score_answers, vqa_score


DESCRIPTION = "VQA accuracy: min(humans who gave the answer / 3, 1) after the standard answer normalisation."


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info("accuracy", DESCRIPTION, "VQA: Visual Question Answering (arXiv:1505.00468)")

    def _compute(self, **answers: Any) -> dict[str, Any]:
        return score_answers(vqa_score, **answers, name="accuracy")
