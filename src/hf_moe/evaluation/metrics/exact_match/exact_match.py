"""Exact match, for `evaluate`."""

from typing import Any

import evaluate

from hf_moe.evaluation.metrics import metric_info
from hf_moe.evaluation.scoring import exact_match_score, score_answers


DESCRIPTION = "The share of answers that equal a reference, except for white space around them."


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info("exact_match", DESCRIPTION)

    def _compute(self, **answers: Any) -> dict[str, Any]:
        return score_answers(exact_match_score, **answers, name="exact_match")
