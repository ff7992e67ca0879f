"""The prior keeps what the new branch is not needed for.

    value of a row = mean over its real tokens t of  (1 - M_t) (1 - R_t)^2        R_t = mean over layers of w_prior

w_prior is the weight of expert 0, the prior, among the attention experts of a layer. M_t is 1 where the new branch is
wanted: at the tokens of some modalities, and where an answer to them is foretold, that is, a label of a row that holds
such tokens. Where M_t is 0, all layers together are driven to the prior. The value lies in [0, 1], is linear in the
tokens of a row, and is added once for the model: the layers' mean is in it.

Source: MoA: Mixture-of-Attention for Subject-Context Disentanglement in Personalized Image Generation,
arXiv:2404.11565; there M is the foreground of an image.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from ...configuration.configuration_hf_moe import MODALITIES
from ..decisions import Decision
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext, is_one_of


@register_objective("moa_image")
class KeepToPrior(Objective):
    """Squared share of the experts that are not the prior.

    Args:
        foreground (`list[str]`, *optional*, defaults to `["image"]`): the modalities whose tokens want the new branch.
        answers (`bool`, *optional*, defaults to `True`): whether the answers to them want it too.

    Raises:
        ValueError: if the model has no attention experts.
    """

    values_by_layer = False

    def __init__(
        self,
        specs: list[MoELayerSpec],
        coef: float,
        *,
        foreground: list[Literal["text", "image", "video", "audio"]] | tuple[str, ...] = ("image",),
        answers: bool = True,
    ):
        super().__init__([spec for spec in specs if spec.part == "attention"], coef)
        if not self.specs:
            raise ValueError(
                "The objective 'moa_image' weighs attention experts, and the model has none: set "
                "moe_config.attention='attention_experts', or remove it."
            )
        self.foreground = [MODALITIES.index(name) for name in foreground]
        self.answers = answers

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        weights = [decision.weight_table()[:, 0] for decision in self.assignments(decisions).values()]
        prior = torch.stack([weight.to(weights[0].device) for weight in weights]).mean(0)  # (T,)
        background = 1.0 - self.wanted(context).flatten().to(prior)
        return context.row_mean(background * (1.0 - prior).square())

    def wanted(self, context: RoutingContext) -> torch.Tensor:
        """Return where the new branch is wanted, M, (B, S) bool."""
        wanted = is_one_of(context.modality_ids, self.foreground)
        labelled = context.labelled
        if labelled is None or not self.answers:
            return wanted
        foretold = F.pad(labelled[:, 1:], (0, 1)).to(wanted.device)
        return wanted | (foretold & wanted.any(1, keepdim=True))
