"""When two tensors are equal but for rounding."""

import torch


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    """Assert that two tensors differ by less than a share of the largest value: sums in another order do by more."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=share * scale, rtol=0)
