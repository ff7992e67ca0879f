"""LoRA experts.

    y = f(x) + sum_i g_i s_i B_i A_i x        A_i (r_i, in), B_i (out, r_i), s_i = lora_alpha / r_i

Source: LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..low_rank import ExpertSlots, add_experts
from .base import ExpertKind, low_rank_pair


class LoraExperts(ExpertKind):
    """Low-rank experts beside a linear layer, or beside a whole module that keeps the width."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return low_rank_pair(self.target)

    def forward(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        tensors: dict[str, Any],
        slots: ExpertSlots,
    ) -> torch.Tensor:
        add = add_experts if tensors["ranks"] is None else tensors["ranks"].add_experts
        return add(call(x), prepare(x), tensors["A"], tensors["B"], slots)
