"""LoRA experts.

    y = f(x) + sum_i g_i s_i B_i A_i x        A_i (r_i, in), B_i (out, r_i), s_i = lora_alpha / r_i

Source: LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

import torch

from ..low_rank import add_experts
from ..stacks import low_rank_pair
from .base import ExpertKind, TargetCall


class LoraExperts(ExpertKind):
    """Low-rank experts beside a linear layer, or beside a whole module that keeps the width."""

    takes_mixed_slots = True

    def tensors(self) -> dict[str, torch.Tensor]:
        return low_rank_pair(self.target)

    def forward(self, call: TargetCall) -> torch.Tensor:
        return add_experts(call.run(call.x), call.prepare(call.x), call.weights, call.decision)
