"""Masked copies: every expert is the feed-forward with its own random share of the weights set to zero.

    W_e = W * m_e        m_e independent, an entry is 0 with probability `mask_rate`        biases as they are

So experts that are spawned from one differ. With `mask_rate` 0 they are copies; for copies with noise, take `copies`
with `noise_std`.

Source: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, arXiv:2112.14397, which
gives no rate.
"""

from collections.abc import Sequence

import torch

from ...configuration.checks import Share
from ..expert_sources import ExpertSource, State, take_neurons


class MaskedCopies(ExpertSource):
    """Copies, or slices, of the feed-forwards without some of the weights.

    Args:
        mask_rate (`float`, *optional*, defaults to 0.1): the share of the weights that is set to zero.
    """

    def __init__(self, seed: int = 0, noise_std: float = 0.0, *, mask_rate: Share = 0.1):
        super().__init__(seed, noise_std)
        self.mask_rate = mask_rate
        self.exact = mask_rate == 0.0

    def expert(self, parents: Sequence[State], expert: int, width: int) -> State:
        state = take_neurons(parents[expert % len(parents)], width, expert * width)
        return {name: tensor if name.endswith("_bias") else self._masked(tensor) for name, tensor in state.items()}

    def _masked(self, weight: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(weight.shape, generator=self.generator, device="cpu").to(weight.device)
        return weight.masked_fill(drawn < self.mask_rate, 0.0)


METHOD = MaskedCopies
