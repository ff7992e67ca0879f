"""Soft modality-aware routing: modalities should be routed differently, and not completely so.

    d(m, n) = 1/2 (KL(P_m || P_n) + KL(P_n || P_m))        L = mean over pairs of  relu(d_min - d) + relu(d - d_max)

P_m is the mean distribution of modality m, that of the previous optimizer step, see [`PopulationMean`]. The pairs are
those of modalities that have tokens: with one alone there is no loss. Inside the band the loss and its gradient are 0.
The gradient of equal distributions is 0 as well, so a gate that cannot tell modalities apart never learns to: give
`top_k` its `modality_bias`. Probabilities count as at least 1e-6 in the logarithms, so d is at most 13.8 nats.

Source: SMAR: Soft Modality-Aware Routing Strategy for MoE-based Multimodal Large Language Models Preserving Language
Capabilities, arXiv:2506.06406.
"""

import torch

from ...configuration.checks import NonNegative
from ..layer_spec import MoELayerSpec
from ..population import PopulationMean
from ..registry import register_objective


@register_objective("smar")
class Smar(PopulationMean):
    """Band on the symmetric divergence of the modalities.

    Args:
        d_min, d_max: the edges of the band, in nats.

    Raises:
        ValueError: if d_max is less than d_min.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, d_min: NonNegative = 1.5, d_max: NonNegative = 2.0):
        super().__init__(specs, coef)
        if d_max < d_min:
            raise ValueError(f"The band of 'smar' is empty: d_max={d_max} is less than d_min={d_min}.")
        self.d_min, self.d_max = d_min, d_max

    def penalty(self, mean: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        log = mean.clamp(min=1e-6).log()
        difference = mean[:, :, None] - mean[:, None]  # (B, G, G, E)
        distance = 0.5 * (difference * (log[:, :, None] - log[:, None])).sum(-1)  # (B, G, G)
        outside = (self.d_min - distance).clamp(min=0.0) + (distance - self.d_max).clamp(min=0.0)
        pairs = (present[:, None] & present).triu(diagonal=1)  # (G, G)
        return (outside * pairs).sum((1, 2)) / pairs.sum().clamp(min=1)
