"""Ternary weights and tokens in whole steps, whose rounding passes gradients on, and five ternary digits in a byte.

    a = mean |W|        W_q = clip(round(W / a), -1, 1)                                  W is read as a W_q
    g = max |x|         x_q = clip(round(Q x / g), -Q - 1, Q)       Q = 2^(bits - 1) - 1       x is read as g x_q / Q

The scale a is of a matrix or of each of its rows, g of each token. Both roundings are straight-through: the gradient
of what is read is that of W or x. A byte holds 3^5 = 243 values, so that a packed weight takes 1.6 bits; rows are
filled up to a multiple of five.

Source: The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, arXiv:2402.17764.
"""

import torch
from torch import nn
from torch.nn import functional as F


DIGITS_PER_BYTE = 5
# The scale of a matrix or a token that is zero, so that nothing is divided by zero.
SMALLEST_SCALE = 1e-8


def ternary(weight: torch.Tensor, by_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the digits -1, 0 and 1 of matrices (..., out, in), int8, and their scales (..., 1 or out, 1)."""
    weight = weight.detach().float()
    scale = weight.abs().mean(-1 if by_row else (-2, -1), keepdim=True).clamp(min=SMALLEST_SCALE)
    return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale


def straight_through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return `rounded`, with the gradient of `values`."""
    return rounded.detach().to(values.dtype) + (values - values.detach())


def pack(digits: torch.Tensor) -> torch.Tensor:
    """Return ternary digits (..., n) as bytes (..., ceil(n / 5)), the first digit in the lowest place."""
    digits = F.pad(digits + 1, (0, -digits.shape[-1] % DIGITS_PER_BYTE)).unflatten(-1, (-1, DIGITS_PER_BYTE))
    return (digits.to(torch.uint8) * _places(digits.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Return the `size` digits in every row of bytes, int8."""
    digits = packed[..., None] // _places(packed.device) % 3  # (..., bytes, 5)
    return digits.flatten(-2)[..., :size].to(torch.int8) - 1


def _places(device: torch.device) -> torch.Tensor:
    return torch.tensor([3**place for place in range(DIGITS_PER_BYTE)], dtype=torch.uint8, device=device)


class TokenRounding(nn.Module):
    """Reads tokens (T, n) in whole steps of their largest entry."""

    def __init__(self, bits: int):
        super().__init__()
        self.steps = 2 ** (bits - 1) - 1  # Q

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        exact = tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32))
        step = exact.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE) / self.steps
        return straight_through(tokens, (exact / step).round().clamp(-self.steps - 1, self.steps) * step)
