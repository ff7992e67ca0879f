"""Rank-1 experts put together from pools: every pair of an up and a down vector is an expert.

    y = f(x) + s * sum_{(i, j) kept} g_ij u_i (v_j . x)        u_i (out,), v_j (in,), i, j < n

n down and n up vectors give n * n experts for the parameters of n. Expert (i, j) has the number i * n + j.

Source: Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning, arXiv:2404.08985.
"""

from dataclasses import replace
from math import isqrt

import torch
from torch.nn import functional as F

from ..stacks import Target, low_rank_pair
from .base import ExpertKind, TargetCall


class Rank1PairExperts(ExpertKind):
    """Pools of n up and n down vectors, E = n * n.

    Raises:
        ValueError: if E is no square, or r is not 1.
    """

    own_parameters = False

    def __init__(self, target: Target):
        super().__init__(target)
        self.pool_size = isqrt(target.num_experts)
        if self.pool_size**2 != target.num_experts or target.rank != 1:
            raise ValueError(
                f"The experts 'rank1_pairs' are the pairs of two pools of vectors: num_experts={target.num_experts} "
                f"must be a square, such as 64 for pools of 8, and r={target.rank} must be 1."
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        return low_rank_pair(replace(self.target, num_experts=self.pool_size, ranks=(1,) * self.pool_size))

    def forward(self, call: TargetCall) -> torch.Tensor:
        result, inputs, weights = call.run(call.x), call.prepare(call.x), call.weights
        inner = F.linear(inputs.reshape(-1, inputs.shape[-1]), weights.a.squeeze(1))  # (T, n) down
        pairs = call.decision.gates.to(inner.dtype).unflatten(1, (self.pool_size, self.pool_size))  # (T, n up, n down)
        mixed = torch.einsum("tud,td->tu", pairs, inner) * weights.scaling
        output = F.linear(mixed, weights.b.squeeze(2).t())  # (T, out)
        return result + output.view(result.shape).to(result.dtype)
