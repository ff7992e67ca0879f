"""Ternary digits in bytes, and tokens in whole steps."""

import torch
from helpers.near import assert_near

from hf_moe.modeling.ternary import TokenRounding, pack, ternary, unpack


def test_tokens_are_read_in_256_steps():
    tokens = torch.tensor([[1.27, 0.014, -1.27, 0.006], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    rounded = TokenRounding(8)(tokens)
    assert_near(rounded, torch.tensor([[1.27, 0.01, -1.27, 0.01], [0.0, 0.0, 0.0, 0.0]]), 1e-6)
    rounded.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_five_digits_of_a_row_fit_in_a_byte():
    digits = ternary(torch.randn(3, 4, 13))[0]
    assert pack(digits).shape == (3, 4, 3) and torch.equal(unpack(pack(digits), 13), digits)
