"""Expert i serves the tokens of the i-th modality; tokens of other modalities get none."""

import torch

from ...configuration.configuration_hf_moe import MODALITIES
from ..decisions import ExpertAssignment
from ..gating import by_modality, check_choice
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("modality")
class ModalityRouter(Router):
    """One expert per named modality, chosen by the token's; no parameters.

    Args:
        spec: facts of the layer; `num_experts` must be the number of modalities.
        modalities: what expert 0, 1, ... serves, from `"text"`, `"image"`, `"video"` and `"audio"`. With one of them,
            only its tokens are adapted (partial LoRA, arXiv:2503.22517).

    Raises:
        ValueError: if a modality is unknown or named twice, or E differs from their number.
    """

    reads = frozenset({"modality"})

    def __init__(self, spec: MoELayerSpec, *, modalities: list[str] | tuple[str, ...] = ("text", "image")):
        super().__init__(spec)
        for name in modalities:
            check_choice("modalities", name, MODALITIES)
        if len(set(modalities)) != len(modalities) or len(modalities) != spec.num_experts:
            raise ValueError(
                f"The router 'modality' has one expert per modality: num_experts={spec.num_experts} must be the "
                f"number of modalities={list(modalities)!r}, each named once."
            )
        places = {name: index for index, name in enumerate(modalities)}
        self.expert_of_modality = [places.get(name, spec.num_experts) for name in MODALITIES]

    def most_experts_per_tok(self) -> int:
        return 1

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        index = by_modality(self.expert_of_modality, context, hidden_states.device)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < self.spec.num_experts).float(), self.spec.num_experts)
