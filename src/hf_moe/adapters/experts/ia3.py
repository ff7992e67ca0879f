"""IA3 vectors as experts (mixture of vectors, MoV).

    y = l * f(x)    or, for feed-forward modules,    y = f(l * x)        l = 1 + sum_i g_i (l_i - 1)

The vectors are merged before use, so the cost is that of one, whatever their number. With weights that sum to 1, l is
sum_i g_i l_i; a token without experts, such as padding, keeps l = 1.

Sources: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv:2205.05638;
Pushing Mixture of Experts to the Limit, arXiv:2309.05444.
"""

import torch

from ..stacks import Target
from .base import ExpertKind, TargetCall


class Ia3Experts(ExpertKind):
    """Scaling vectors on the output of a target, or on the input of feed-forward ones.

    Args:
        feedforward_modules: last name parts of the targets whose input is scaled, as in PEFT's `IA3Config`.
    """

    def __init__(self, target: Target, *, feedforward_modules: list[str] | tuple[str, ...] = ("down_proj",)):
        super().__init__(target)
        self.scales_input = target.name in feedforward_modules

    def tensors(self) -> dict[str, torch.Tensor]:
        width = self.target.in_features if self.scales_input else self.target.out_features
        return {"vector": torch.ones(self.target.num_experts, width)}

    def forward(self, call: TargetCall) -> torch.Tensor:
        vectors = call.weights.vector
        scale = 1.0 + call.decision.gates.to(vectors.dtype) @ (vectors - 1.0)  # (T, width)
        if self.scales_input:
            return call.run((call.x * scale.view(call.x.shape)).to(call.x.dtype))
        result = call.run(call.x)
        return (result * scale.view(result.shape)).to(result.dtype)
