# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""The language loss of ERNIE 4.5 VL, in which a sample with many vision tokens weighs less per word of its answer.

    loss = sum_r (n_r / N) * CE_r / m_r

with CE_r the summed cross-entropy of row r, n_r its labels, m_r all of its real tokens, those of images included, and
N the labels of the optimizer step. The usual loss has n_r in the place of m_r. It is linear in the rows, which may be
split over micro-batches and processes at will.

The report names a token-balanced loss without a formula; this one was chosen.
Source: ERNIE 4.5 Technical Report (2025).
"""

import torch
from torch.nn import functional as F


def token_balanced_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_mask: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the token-balanced language loss, a float32 scalar.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)`): of every position.
        labels (`torch.Tensor` of shape `(B, S)`): the tokens to predict, -100 where masked; shifted inside.
        token_mask (`torch.Tensor` of shape `(B, S)`, bool): True where a token is real.
        num_items_in_batch (`int`, *optional*): N; the labels of the batch when absent.
    """
    labels = labels[:, 1:].to(logits.device)  # (B, S - 1)
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    row_labels = (labels != -100).sum(-1)  # (B,)
    total = row_labels.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(labels.device)
    tokens = token_mask.to(labels.device).sum(-1).clamp(min=1)  # (B,)
    return (row_labels / total.clamp(min=1) * losses.sum(-1) / tokens).sum()
