"""When two tensors are equal but for rounding."""

from collections.abc import Sequence

import torch


def assert_near(
    found: torch.Tensor | Sequence[torch.Tensor], expected: torch.Tensor | Sequence[torch.Tensor], share: float = 1e-6
) -> None:
    """Assert that tensors differ by less than a share of the largest value: sums in another order do by more."""
    if not isinstance(expected, torch.Tensor) and isinstance(expected, Sequence):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_near(ours, theirs, share)
        return
    if expected is None or found is None:
        assert found is expected
        return
    if isinstance(expected, torch.Tensor) and expected.dtype is torch.bool:
        assert torch.equal(found, expected)
        return
    scale = max(1.0, float(torch.as_tensor(expected).abs().max())) if torch.as_tensor(expected).numel() else 1.0
    torch.testing.assert_close(found, expected, atol=share * scale, rtol=0)
