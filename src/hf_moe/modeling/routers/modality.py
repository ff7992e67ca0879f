"""Expert i serves the tokens of the i-th modality.

    expert = e(modality)        weight 1        K = 1, whatever `num_experts_per_tok` says

Tokens of a modality that is not named get no expert, as in partial LoRA, or share one, as in VLMo's decoder. It is the
control of every learned router: the same experts at the same cost, and nothing to learn.

Sources: Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities, arXiv:2503.22517; VLMo:
Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts, arXiv:2111.02358.
"""

import torch

from ...configuration.configuration_hf_moe import MODALITIES
from ..decisions import ExpertAssignment
from ..gating import by_modality, check_choice, gates_of
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
        share: let video use the image expert, and others the text expert, unless they are named.

    Raises:
        ValueError: if a modality is unknown or named twice, E differs from their number, or `share` is set and text
            is not the first of them.
    """

    reads = frozenset({"modality"})

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        modalities: list[str] | tuple[str, ...] = ("text", "image"),
        share: bool = False,
    ):
        super().__init__(spec)
        for name in modalities:
            check_choice("modalities", name, MODALITIES)
        if len(set(modalities)) != len(modalities) or len(modalities) != spec.num_experts:
            raise ValueError(
                f"The router 'modality' has one expert per modality: num_experts={spec.num_experts} must be the "
                f"number of modalities={list(modalities)!r}, each named once."
            )
        places = {name: index for index, name in enumerate(modalities)}
        alone = [places.get(name, spec.num_experts) for name in MODALITIES]
        self.expert_of_modality = gates_of(modalities) if share else alone

    def most_experts_per_tok(self) -> int:
        return 1

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        index = by_modality(self.expert_of_modality, context, hidden_states.device)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < self.spec.num_experts).float(), self.spec.num_experts)
