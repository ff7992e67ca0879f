"""Entropy minimisation: a model becomes surer of what it says of samples that nobody has labelled.

    loss = sum_t H(p_t) / N        p_t = softmax of the logits of token t        over the N tokens that are counted

It takes the place of the language loss, in a stage with `loss: entropy` or as `Trainer(compute_loss_func=...)`.

Sources: Tent: Fully Test-time Adaptation by Entropy Minimization, arXiv:2006.10726; Merging Multi-Task Models via
Weight-Ensembling Mixture of Experts, arXiv:2402.00433.
"""

from typing import Any

import torch


def prediction_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the mean entropy of the next-token predictions, a float32 scalar.

    Args:
        outputs: of a model, with `logits` (B, S, V).
        labels (`torch.Tensor` of shape `(B, S)`): -100 where a token is not counted; what they are else is not read.
        num_items_in_batch (`int`, *optional*): N; the counted tokens of the batch when absent.
    """
    counted = labels[:, 1:].to(outputs.logits.device) != -100  # (B, S - 1)
    log_probs = outputs.logits[:, :-1].float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, S - 1)
    total = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return entropy.masked_fill(~counted, 0.0).sum() / torch.as_tensor(total).to(entropy.device).clamp(min=1)
