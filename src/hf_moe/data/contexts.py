"""How possible it is that a token belongs to a context, from the spans that people have annotated.

    alpha-certain      1 in the span, 1 - alpha elsewhere
    beta-trapezoid     1 in the span, falling to 0 along beta times its length on both sides

Source: Contextual Mixture of Experts: Integrating Knowledge into Predictive Modeling, arXiv:2211.00558.
"""

from collections.abc import Sequence

import torch


def span_membership(
    spans: Sequence[Sequence[tuple[int, int]]], length: int, *, alpha: float | None = None, beta: float | None = None
) -> torch.Tensor:
    """Return the membership (length, C) of every token of a row; a context without spans is possible everywhere.

    Args:
        spans: the spans of every context, from a token up to another one, which is not in it.
        length: how many tokens the row has.
        alpha, beta: which of the two shapes, and its number: 0.9 and 0.1 in our catalogue.

    Raises:
        ValueError: unless one of alpha and beta is given, a span is within the row, and alpha lies in [0, 1].
    """
    if (alpha is None) == (beta is None) or not 0 <= (alpha or 0) <= 1 or (beta or 0) < 0:
        raise ValueError(f"Give alpha in [0, 1] or beta >= 0, got alpha={alpha} and beta={beta}.")
    place, margin = torch.arange(length), beta or 0.0
    columns = []
    for context in spans:
        value = torch.zeros(length) if context else torch.ones(length)
        for start, end in context:
            if not 0 <= start < end <= length:
                raise ValueError(f"The span {(start, end)} must lie in a row of {length} tokens.")
            distance = (start - place).clamp(min=0) + (place - end + 1).clamp(min=0)  # 0 inside
            if alpha is not None:
                shape = torch.where(distance == 0, 1.0, 1.0 - alpha)
            else:
                shape = (1 - distance / (margin * (end - start) + 1e-9)).clamp(min=0)
            value = torch.maximum(value, shape)
        columns.append(value)
    return torch.stack(columns, -1)
