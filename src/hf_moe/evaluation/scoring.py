"""Scores of short answers: VQA accuracy with its answer normalisation, exact match, means by question type.

    accuracy(answer) = min(humans who gave it / 3, 1)

VQA: Visual Question Answering (arXiv:1505.00468). The official server also averages over the subsets that leave one
human out; this is the formula of the paper.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any


AGREEING_HUMANS = 3
ARTICLES = {"a", "an", "the"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBERS)}
SPELLED_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't
    oughtn't shan't shouldn't wasn't weren't won't wouldn't could've i've might've must've not've should've
    they've we've who've would've you've i'm let's he's here's how's she's somebody's someone's something's
    that's there's what's when's where's who's why's it'd they'd who'd you'd it'll that'll they'll what'll
    who'll you'll they're what're you're ma'am o'clock y'all 'twas
""".split()
CONTRACTIONS = {word.replace("'", ""): word for word in SPELLED_CONTRACTIONS}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise_answer(answer: str) -> str:
    """Return the answer as VQA compares it: lower case, no punctuation, no articles, digits, spelled contractions."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        # A mark beside a space says nothing; one between two words separates them, except in 1,000.
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if touches_space or has_thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, references: str | Sequence[str]) -> float:
    """Return the VQA accuracy of one answer, 0 to 1; fewer than three references must all agree for a 1."""
    references = _checked(prediction, references)
    answer = normalise_answer(prediction)
    agreeing = sum(normalise_answer(reference) == answer for reference in references)
    return min(agreeing / min(AGREEING_HUMANS, len(references)), 1.0)


def exact_match_score(prediction: str, references: str | Sequence[str]) -> float:
    """Return 1 if the answer is one of the references, except for white space around it, else 0."""
    references = _checked(prediction, references)
    return float(prediction.strip() in {reference.strip() for reference in references})


def score_answers(
    score: Callable[[str, str | Sequence[str]], float],
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    question_types: Sequence[str | None] | None = None,
    name: str = "accuracy",
) -> dict[str, Any]:
    """Return [`mean_scores`] of a list of answers; an error names the first answer or reference that is no text."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("Predictions and references are lists with one item per question; got text.")
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions and {len(references)} references: give one each.")
    scores = []
    for index, pair in enumerate(zip(predictions, references, strict=True)):
        try:
            scores.append(score(*pair))
        except ValueError as error:
            raise ValueError(f"Answer {index}: {error}") from error
    return mean_scores(scores, name, question_types)


def mean_scores(
    scores: Sequence[float], name: str, question_types: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Return the mean as `name`, the `count`, and with `question_types` the means as `name_by_question_type`.

    A score without a type (`None`) counts in the mean alone.
    """
    if not scores:
        raise ValueError("There are no answers to score.")
    result: dict[str, Any] = {name: sum(scores) / len(scores), "count": len(scores)}
    if question_types is not None:
        if len(question_types) != len(scores):
            counts = f"{len(scores)} answers and {len(question_types)} question types"
            raise ValueError(f"There are {counts}: give one each.")
        groups: dict[str, list[float]] = {}
        for score, question_type in zip(scores, question_types, strict=True):
            if question_type is not None:
                groups.setdefault(str(question_type), []).append(score)
        by_type = {question_type: sum(group) / len(group) for question_type, group in sorted(groups.items())}
        result[f"{name}_by_question_type"] = by_type
    return result


def _checked(prediction: str, references: str | Sequence[str]) -> Sequence[str]:
    """Return the references as a list."""
    several = [references] if isinstance(references, str) else references
    if not isinstance(several, Sequence) or not several:
        raise ValueError(f"an answer is compared with one or several references, got {references!r}.")
    for kind, answer in (("prediction", prediction), *(("reference", reference) for reference in several)):
        if not isinstance(answer, str):
            raise ValueError(f"the {kind} {answer!r} is no text but {type(answer).__name__}.")
    return several
