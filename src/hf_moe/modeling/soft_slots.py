"""The weights of soft slots, arXiv:2308.00951: slots are mixtures of tokens, and tokens mixtures of their outputs."""

import torch

from .routing_context import RoutingContext


def slot_dispatch(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of every token in every slot: the softmax over the tokens that are counted, 0 for the others.

    Args:
        logits (`torch.Tensor` of shape `(B, S, N)`): float32.
        mask (`torch.Tensor` of shape `(B, S)`, bool): the tokens that are counted.

    Returns:
        `torch.Tensor` of shape `(B, S, N)`; its columns sum to 1 in every row with a token that is counted.
    """
    counted = mask[..., None]  # (B, S, 1)
    shares = logits.masked_fill(~counted, torch.finfo(logits.dtype).min).softmax(1)
    return shares.masked_fill(~counted, 0.0)


def slot_combine(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of every slot in every token: the softmax over the slots, 0 for tokens that are not counted.

    A slot with the logit -inf has no share, and a token whose slots all have it gets nothing. See [`slot_dispatch`].
    """
    closed = logits == float("-inf")
    shares = logits.masked_fill(closed, torch.finfo(logits.dtype).min).softmax(-1)
    return shares.masked_fill(closed | ~mask[..., None], 0.0)


def refuse_documents(context: RoutingContext, name: str) -> None:
    """Refuse rows of several documents, whose tokens the slots would mix.

    Raises:
        ValueError: if there are such rows.
    """
    if context.documents is not None:
        raise ValueError(
            f"The router {name!r} mixes all tokens of a row, and this one holds several documents: leave packing "
            "out, or choose another router."
        )
