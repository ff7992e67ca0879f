"""Admission: which of the tokens that compete for the room in a group get in, best first.

Experts that choose tokens, experts that are full, and matchings of tokens and experts all come down to this.
"""

import math

import torch


# The entropy's weight in [`capped`], round by round.
CAP_ENTROPIES = [0.1 * 0.01 ** (turn / 99) for turn in range(100)]


def room(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Return `ceil(share * tokens)` as floats, for a share such as `capacity_factor * K / E` of counted tokens."""
    # The margin keeps a product such as 1.1 * 10 from rounding up past the integer it stands for.
    return (tokens * share - 1e-4).ceil()


def group_sizes(group: torch.Tensor) -> torch.Tensor:
    """Return for every token how many are in its group, itself included, (T,) int64.

    Args:
        group (`torch.Tensor` of shape `(T,)`, int64): any numbers.
    """
    ordered = group.sort().values
    return torch.searchsorted(ordered, group, right=True) - torch.searchsorted(ordered, group)


@torch.no_grad()
def take_best(scores: torch.Tensor, group: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """Return which tokens of every group are among its `capacity` best; of equal ones the earlier goes first.

    One sort of T numbers in every column: by group, and within a group by falling score.

    Args:
        scores (`torch.Tensor` of shape `(T,)` or `(T, C)`): in every column C there is another contest.
        group (`torch.Tensor` of shape `(T,)`, int64): in [-2^30, 2^30); those of one number compete.
        capacity (`torch.Tensor` of shape `(T,)`): how many of the token's group get in, the same for all of a group.

    Returns:
        `torch.Tensor` of the shape of `scores`, bool.
    """
    columns = scores.view(len(scores), -1).T.float() + 0.0  # (C, T); -0.0 becomes 0.0, which it is equal to
    # The bits of a float are in order as a whole number, once the magnitude of negative ones is turned around.
    bits = columns.contiguous().view(torch.int32)
    falling = -(bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    order = ((group << 32) + falling).argsort(dim=-1, stable=True)  # (C, T)
    ordered = group.sort().values  # (T,), what every row of `order` leads through
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    admitted = place < capacity[order]  # (C, T)
    return torch.empty_like(admitted).scatter(1, order, admitted).T.reshape(scores.shape)


@torch.no_grad()
def capped(scores: torch.Tensor, group: torch.Tensor, capacity: torch.Tensor, most: int) -> torch.Tensor:
    """Return scores (T, C) less a price for every token: by these, few tokens are taken in more than `most` columns.

    Taken with [`take_best`] they round the solution A of

        max_A sum_{t,c} A_{t,c} s_{t,c} + l H(A)        sum of A over a group = its capacity, in every column
                                                        sum_c A_{t,c} <= most,  0 <= A <= 1

    The prices are dual variables, found by coordinate ascent, which is what Dykstra's alternating projections are to
    them. 100 rounds at l = 0.001, as in the paper, are far from the solution: l falls to that from 0.1. With T = 512,
    C = 64, capacity 16 and most 2, 8% of the tokens stay above the cap then, not 25%; without a cap it is 31%.

    Source: Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368.

    Args:
        scores (`torch.Tensor` of shape `(T, C)`): in [0, 1].
        group (`torch.Tensor` of shape `(T,)`, int64): in [0, 2 T].
        capacity (`torch.Tensor` of shape `(T,)`): of the token's group.
        most (`int`): the cap.
    """
    rows = group[:, None].expand_as(scores)
    table = scores.new_zeros(2 * len(scores) + 1, scores.shape[1])
    token, cell = torch.zeros_like(scores[:, :1]), torch.zeros_like(scores)
    for entropy in CAP_ENTROPIES:
        values = (scores - token - cell) / entropy
        peak = table.scatter_reduce(0, rows, values, "amax", include_self=False).gather(0, rows)
        total = table.scatter_add(0, rows, (values - peak).exp()).gather(0, rows)
        column = entropy * (peak + total.log() - capacity.log()[:, None])  # fills the capacity of a group
        used = ((scores - column - cell) / entropy).logsumexp(-1, keepdim=True) - math.log(most)
        token = entropy * used.clamp(min=0.0)  # keeps the cap
        cell = (scores - column - token).clamp(min=0.0)  # keeps A below 1
    return scores - token
