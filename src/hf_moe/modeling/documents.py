"""Which of several documents in a row a token belongs to, where rows are packed.

Transformers' and TRL's collators say so by positions that start again, by `seq_idx` or by `cu_seq_lens_q`; attention
then keeps the documents apart, and what pools tokens must as well.
"""

from collections.abc import Mapping
from typing import Any

import torch


def packed_documents(inputs: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Return the number of every token's document in its row, (B, S); `None` where no row holds several.

    Args:
        inputs: of a call without cached tokens, by name.
        shape: B and S.
    """
    starts = _starts(inputs, shape)  # (B, S), or (1, S) for all rows
    if starts is None or not bool(starts.any()):
        return None
    return starts.long().cumsum(1).expand(shape)


def _starts(inputs: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Return which tokens are the first of a document, but for those of the first ones."""
    seq_idx, boundaries, positions = (inputs.get(name) for name in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    if seq_idx is not None:
        return seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0
    if boundaries is not None and shape[0] == 1:
        places = torch.arange(shape[1], device=boundaries.device)
        return torch.isin(places, boundaries[1:])[None]
    if positions is None:
        return None
    if positions.dim() == 3 and len(positions) == 4:  # those of the text, before those in time, height and width
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[1] != shape[1]:
        return None
    return positions.diff(dim=1, prepend=positions[:, :1] - 1) < 1
