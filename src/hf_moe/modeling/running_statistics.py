"""Statistics over optimizer steps: kept in buffers, summed over processes."""

from collections.abc import Callable

import torch
from torch import nn


class KeepsBufferTypes(nn.Module):
    """Base of what keeps statistics in buffers: these keep their type, whatever the model is cast to.

    A count in bf16 stops at 256, one in fp16 overflows at 65,504, and a bias of 0.3 does not see a step of 0.001.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KeepsBufferTypes":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, own_name = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), own_name, buffer.to(moved.device))
        return self


def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
    """Return `counts` summed over the processes of a distributed run, or `counts` itself in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


def finite(sums: torch.Tensor) -> torch.Tensor:
    """Return the sums of a micro-batch, or zeros where it overflowed: `GradScaler` skips its step, and a population
    that is not finite would make every later loss so."""
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
