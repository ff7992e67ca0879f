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


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows (n, C) of all processes of a distributed run, in their order, or `rows` in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, own)
    sizes = torch.cat(counts).tolist()
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def finite(sums: torch.Tensor) -> torch.Tensor:
    """Return the sums of a micro-batch, or zeros where it overflowed: `GradScaler` skips its step, and a population
    that is not finite would make every later loss so."""
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
