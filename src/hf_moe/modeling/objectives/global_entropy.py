"""Global entropy: every modality uses at least so many experts in the mean.

    L = sum over modalities m of  max(0, log k_m - H(mean over the tokens of m of p))

One-sided: exp(H) counts the experts that share a modality, and one that keeps k_m of them may specialise as it likes.
The mean distribution is that of the previous optimizer step, see [`PopulationMean`]; a modality without tokens has no
term. It goes with `local_entropy`, which makes single tokens decide.

Source: Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts, arXiv:2206.02770.
"""

import math

import torch

from ...configuration.checks import Positive
from ...configuration.configuration_hf_moe import MODALITIES
from ..gating import check_choice
from ..layer_spec import MoELayerSpec
from ..population import PopulationMean
from ..registry import register_objective


@register_objective("global_entropy")
class GlobalEntropy(PopulationMean):
    """Thresholded entropy of the mean distribution of each modality, in nats; the paper's coefficient is 0.04.

    Args:
        min_experts: k_m by the name of the modality; one that is not named is free. When absent, a quarter of a
            layer's experts for text and three fifths for images, rounded up, as 9 and 20 of the paper's 32.

    Raises:
        ValueError: if no modality is named or one is unknown, or k_m does not lie in [1, E].
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, min_experts: dict[str, Positive] | None = None):
        super().__init__(specs, coef)
        if min_experts is not None and not min_experts:
            raise ValueError("min_experts={} names no modality: name one, or remove the objective 'global_entropy'.")
        for name, number in (min_experts or {}).items():
            check_choice("a name in min_experts", name, MODALITIES)
            fewest = min(spec.num_experts for spec in specs)
            if not 1 <= number <= fewest:
                raise ValueError(f"min_experts={min_experts}: {name!r} must lie in [1, {fewest}], a layer's experts.")
        self.min_experts = min_experts

    def penalty(self, mean: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        experts = mean.shape[-1]
        wanted = {"text": math.ceil(0.25 * experts), "image": math.ceil(0.6 * experts)}
        wanted = wanted if self.min_experts is None else self.min_experts
        entropy = -(mean * mean.clamp(min=1e-20).log()).sum(-1)  # (B, G)
        lacking = [
            (math.log(number) - entropy[:, MODALITIES.index(name)]).clamp(min=0.0) * present[MODALITIES.index(name)]
            for name, number in wanted.items()
        ]
        return torch.stack(lacking).sum(0)
