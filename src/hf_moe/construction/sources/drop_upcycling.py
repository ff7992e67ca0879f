"""Drop-Upcycling: experts are copies of the feed-forward, of which a part is drawn anew.

For every expert e of m inner neurons:

    1. its neurons are the first m of a random permutation of the feed-forward's;
    2. a random set S_e of floor(r m) of them is drawn anew: the rows S_e of the gate and up projections and the
       columns S_e of the down projection are N(mu, sigma), per matrix with the mu and sigma of what they replace.

Two experts share about (1 - r)^2 of the neurons, so that they start apart while each keeps a part 1 - r of the dense
function. r = 0 is sparse upcycling up to the order of the neurons.

Source: Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization, arXiv:2502.19261.
"""

from collections.abc import Sequence
from typing import Annotated

import torch

from ...configuration.checks import Interval
from ..expert_sources import ExpertSource, State, pick_neurons, take_neurons


class DropUpcycling(ExpertSource):
    """Permuted copies with neurons drawn anew.

    Args:
        reinit_ratio (`float`, *optional*, defaults to 0.5): r, the share of an expert's neurons that is drawn anew.
        shuffle_units (`bool`, *optional*, defaults to `True`): whether neurons are permuted; else narrow experts take
            consecutive slices.
    """

    def __init__(
        self,
        seed: int = 0,
        noise_std: float = 0.0,
        *,
        reinit_ratio: Annotated[float, Interval(0, 1)] = 0.5,
        shuffle_units: bool = True,
    ):
        super().__init__(seed, noise_std)
        self.reinit_ratio = reinit_ratio
        self.shuffle_units = shuffle_units
        self.exact = reinit_ratio == 0.0

    def expert(self, parents: Sequence[State], expert: int, width: int) -> State:
        parent = parents[expert % len(parents)]
        full = parent["down_proj"].shape[-1]
        if self.shuffle_units:
            order = torch.randperm(full, generator=self.generator, device="cpu")
            state = pick_neurons(parent, order[torch.arange(width) % full])
        else:
            state = take_neurons(parent, width, expert * width)
        drawn = torch.randperm(width, generator=self.generator, device="cpu")[: int(self.reinit_ratio * width)]  # S_e
        return {name: self._draw_anew(name, tensor, drawn) for name, tensor in state.items()}

    def _draw_anew(self, name: str, tensor: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        if name == "down_proj_bias" or len(drawn) == 0:  # that bias is of no neuron
            return tensor
        if name.startswith("gate_up_proj"):
            return torch.cat([self._draw_anew("up_proj", half, drawn) for half in tensor.chunk(2)])
        drawn = drawn.to(tensor.device)
        new = tensor.clone()
        rows = new.t() if name == "down_proj" else new  # (m, d), or (m,) of a bias
        old = rows[drawn].float()
        fresh = torch.randn(old.shape, generator=self.generator, device="cpu").to(old.device)
        rows[drawn] = (old.mean() + fresh * old.std(correction=0)).to(tensor.dtype)
        return new


METHOD = DropUpcycling
