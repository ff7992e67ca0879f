"""Mean importance: the experts' mean probabilities should be equal.

    L = E * sum_i m_i^2        m = the mean over tokens of P_t, renormalised over the real experts

and the mean over layers: 1 where the mean is uniform, E where all tokens are surely one expert's. The mean is that of
the previous optimizer step, see [`PopulationMean`]. Unlike `load_balance` it counts no choices: it moves probabilities
alone.

Source: SpeechMoE: Scaling to Large Acoustic Models with Dynamic Routing Mixture of Experts, arXiv:2105.03036.
"""

import torch

from ..layer_spec import MoELayerSpec
from ..population import PopulationMean
from ..registry import register_objective


@register_objective("mean_importance")
class MeanImportance(PopulationMean):
    """Squared mean probabilities, over all tokens.

    Raises:
        ValueError: in `forward`, if no router gives probabilities.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float):
        super().__init__(specs, coef, num_groups=1)

    def penalty(self, mean: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return mean.shape[-1] * mean.square().sum((1, 2))  # (B,)
