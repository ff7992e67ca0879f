"""Expert contrast: outputs of one expert should be like each other and unlike those of the others.

InfoNCE with the experts as classes. With y_t the output of token t's expert e(t), normalised, and c_e the normalised
mean output of expert e over the row:

    L = mean over tokens of -log( exp(y_t . c_e(t) / tau) / sum_e exp(y_t . c_e / tau) )

where the sum runs over the experts that the row uses. A token with several experts has one mixed output, which belongs
to none: top-1 routing only.

Source: EvoMoE, arXiv:2505.23830, compares a contrastive loss between experts without giving its form; this one is the
smallest that needs no expert to run on tokens it was not chosen for.
"""

import torch
from torch.nn import functional as F

from ...configuration.checks import Positive
from ..decisions import Decision
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("expert_contrast")
class ExpertContrast(Objective):
    """Contrast between the experts' outputs within a row.

    Args:
        specs: the MoE layers of the model; all with one slot per token.
        temperature: tau, > 0.

    Raises:
        ValueError: if a layer has more than one slot per token.
    """

    reads = frozenset({"outputs"})

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, temperature: Positive = 0.1):
        super().__init__(specs, coef)
        several = [spec.layer_idx for spec in specs if spec.num_experts_per_tok != 1]
        if several:
            raise ValueError(
                "expert_contrast contrasts the outputs of single experts: set num_experts_per_tok=1 in the layers "
                f"{several}."
            )
        self.temperature = temperature

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        values = []
        for site, decision in self.assignments(decisions).items():
            outputs = F.normalize(context.outputs[site].float(), dim=-1)  # (B, S, d)
            rows, positions, _ = outputs.shape
            index = decision.expert_index.view(rows, positions)
            # An empty slot is in no class.
            member = F.one_hot(index, decision.num_experts + 1)[..., :-1].to(outputs.dtype)  # (B, S, E)
            centres = F.normalize(member.transpose(1, 2) @ outputs, dim=-1)  # (B, E, d)
            scores = outputs @ centres.transpose(1, 2) / self.temperature  # (B, S, E)
            scores = scores.masked_fill(member.sum(1, keepdim=True) == 0, float("-inf"))
            own = (scores.masked_fill(member == 0, 0.0)).sum(-1)  # (B, S)
            used = member.sum(-1) > 0
            total = scores.masked_fill(~used[..., None], 0.0).logsumexp(-1)
            values.append(context.row_mean((total - own).masked_fill(~used, 0.0).flatten()))
        return self.reduce_layers(values)
