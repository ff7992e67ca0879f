"""Sparse upcycling: every expert starts as the feed-forward that it replaces.

With router weights that sum to 1, equal experts give `sum_i w_i FFN(x) = FFN(x)`: the new model computes what the
dense one does. It does not where weights do not sum to 1 (a single slot, unnormalised top-k, empty slots). Experts
that are narrower than the feed-forward take consecutive slices of its inner neurons, and start over at their end: N
experts of 1/N of the width hold all of it. With several models, the experts take theirs in turn (Branch-Train-MiX).

Sources: Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, arXiv:2212.05055; Branch-Train-MiX:
Mixing Expert LLMs into a Mixture-of-Experts LLM, arXiv:2403.07816.
"""

from collections.abc import Sequence

from ...configuration.checks import NonNegative
from ..expert_sources import ExpertSource, State, take_neurons


class Copies(ExpertSource):
    """Copies, or slices, of the feed-forwards.

    Args:
        beside (`float`, *optional*): how much of the output the experts give beside a shared branch that
            is the whole feed-forward, as in MoTE. Half each when absent, which adds up to the feed-forward.
    """

    exact = True

    def __init__(self, seed: int = 0, noise_std: float = 0.0, *, beside: NonNegative | None = None):
        super().__init__(seed, noise_std)
        self.beside = beside

    def expert(self, parents: Sequence[State], expert: int, width: int) -> State:
        return take_neurons(parents[expert % len(parents)], width, expert * width)


METHOD = Copies
