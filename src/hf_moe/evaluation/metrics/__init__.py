"""Metric modules for `evaluate.load(metric_path(name))`, which needs no network."""

from pathlib import Path
from typing import Any


INPUTS = """
Args:
    predictions (list of str): one answer per question.
    references (list of str, or list of lists of str): the right answer, or the answers of several humans.
    question_types (list of str, *optional*): for means by question type.
Returns:
    `{0}` (0 to 1), `count`, and with question types `{0}_by_question_type`.
"""


def metric_path(name: str) -> str:
    """Return the folder of a metric; an error names those that there are."""
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"No metric is named {name!r}; there are {', '.join(names)}.")
    return str(folder / name)


def metric_info(name: str, description: str, citation: str = "") -> Any:
    """Return what `evaluate` wants to know of a metric of short answers, whose mean is called `name`."""
    import evaluate
    from datasets import Features, List, Value

    answer = Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=INPUTS.format(name),
        features=[Features({"predictions": answer, "references": form}) for form in (List(answer), answer)],
    )
