"""Experts whose matrices are tensor trains with one central core for all of them.

    W_e = T_1,e T_2,e C T_4,e T_5,e        for n = 5 cores, each of W_gate, W_up and W_down, see `tensor_train.py`

C, the core in the middle, holds most of a matrix: E experts have C + E sum_k T_k numbers in place of E I J. The cores
around it are each expert's own, and start as those of one feed-forward with noise. In training the gradient of C is
kept in a forward with probability 1 - p and zero otherwise, as all experts add to it: one draw from torch's generator
for all matrices of a layer.

A forward makes the matrices of the experts that have tokens (of all on other backends than `"ragged"`), each at
I J (d_l + d_r) multiplications, with d_l and d_r the bonds of C: as much as that many tokens cost.

Source: Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models, arXiv:2203.01104.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, PositiveInt, Share
from ..computed_stacks import EVERY, Chosen, ComputedStacks
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..tensor_train import contract, core_shapes, decompose


@register_experts("mpoe")
class TensorTrainExperts(ComputedStacks):
    """Feed-forward experts in cores: `<matrix>_central`, and `<matrix>_core<k>` (E, ...) for the others.

    Args:
        num_cores (`int`, *optional*, defaults to 5): n, odd and at least 3.
        bond_dim (`int`, *optional*): the largest bond; exact ones when absent.
        central_mask_prob (`float`, *optional*, defaults to 1 - 1 / E): p.
        init_noise (`float`, *optional*, defaults to 0.01): of an expert's own cores at the start, relative to the
            standard deviation of each.

    Raises:
        ValueError: if n is even or 1.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        num_cores: PositiveInt = 5,
        bond_dim: PositiveInt | None = None,
        central_mask_prob: Share | None = None,
        init_noise: NonNegative = 0.01,
    ):
        if num_cores < 3 or num_cores % 2 == 0:
            raise ValueError(f"num_cores={num_cores} must be odd and at least 3: one core is in the middle of others.")
        # They tell `add_stack` what to make.
        self.num_cores, self.bond_dim = num_cores, bond_dim
        super().__init__(config, spec)
        self.init_noise = init_noise
        self.central_mask_prob = 1 - 1 / spec.num_experts if central_mask_prob is None else central_mask_prob
        # Whether the central cores learn from a forward, 0 or 1, while it runs.
        self.kept: torch.Tensor | None = None

    def add_stack(self, name: str, *shape: int) -> None:
        if len(shape) == 1:
            return super().add_stack(name, *shape)
        matrices = self.matrices(name)
        for matrix in matrices:
            shapes = core_shapes(shape[0] // len(matrices), shape[1], self.num_cores, self.bond_dim)
            for core, size in zip(self.core_names(matrix), shapes, strict=True):
                own = size if core.endswith("_central") else (self.num_experts, *size)
                self.register_parameter(core, nn.Parameter(torch.empty(own)))
        return None

    def matrices(self, name: str) -> list[str]:
        """Return the names of the matrices in a stack, one below the other."""
        return ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]

    def core_names(self, matrix: str) -> list[str]:
        """Return the names of a matrix's cores in their order."""
        names = [f"{matrix}_core{place + 1}" for place in range(self.num_cores)]
        names[self.num_cores // 2] = f"{matrix}_central"
        return names

    def cores(self, matrix: str) -> list[torch.Tensor]:
        """Return the cores of a matrix: the middle one, and stacks (E, ...) of the others."""
        return [getattr(self, core) for core in self.core_names(matrix)]

    def initialize(self, std: float) -> None:
        super().initialize(std)
        for name in self.stack_names:
            for matrix in self.matrices(name):
                cores, middle = self.cores(matrix), self.num_cores // 2
                numbers = math.prod(core.shape[-3] * core.shape[-2] for core in cores)  # I J
                # The other cores are orthonormal, so that a matrix is as large as its central core.
                init.normal_(cores[middle], std=std * (numbers / cores[middle].numel()) ** 0.5)
                for place, core in enumerate(cores):
                    if place != middle:
                        bond = core.shape[-1] if place < middle else core.shape[1]
                        basis = torch.eye(core[0].numel() // bond, bond, device=core.device)
                        basis = basis if place < middle else basis.T
                        init.copy_(core, self._with_noise(basis.reshape(core.shape[1:])))

    def _with_noise(self, core: torch.Tensor) -> torch.Tensor:
        """Return a core for every expert, (E, ...)."""
        noise = torch.randn(self.num_experts, *core.shape, device=core.device)
        return core + self.init_noise * core.std(correction=0) * noise

    def weight(self, name: str, experts: Chosen = EVERY) -> torch.Tensor:
        middle, found = self.num_cores // 2, []
        for matrix in self.matrices(name):
            cores = self.cores(matrix)
            central = cores[middle]
            if self.kept is not None:
                central = central * self.kept + central.detach() * (1 - self.kept)
            before, after = ([core[experts] for core in part] for part in (cores[:middle], cores[middle + 1 :]))
            found.append(contract(before, central, after))
        return torch.cat(found, 1)

    def forward(self, hidden_states: torch.Tensor, *decision: Any, **dispatch: Any) -> torch.Tensor:
        central = self.down_proj_central
        drawn = torch.rand((), device=central.device) >= self.central_mask_prob if self.training else None
        self.kept = None if drawn is None else drawn.to(central.dtype)
        return super().forward(hidden_states, *decision, **dispatch)

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        mean: dict[str, torch.Tensor] = {}
        equal = True
        for expert, state in enumerate(states):
            for name, tensor in state.items():
                if name.endswith("_bias"):
                    getattr(self, name)[expert].copy_(tensor)
                    continue
                mean.setdefault(name, tensor.float())
                difference = tensor.float() - mean[name]
                equal = equal and not difference.any()
                mean[name] = mean[name] + difference / (expert + 1)
        for name, stack in mean.items():
            matrices = self.matrices(name)
            for matrix, weight in zip(matrices, stack.chunk(len(matrices)), strict=True):
                own = self.cores(matrix)
                shapes = [tuple(core.shape[-4:]) for core in own]
                for core, value in zip(own, decompose(weight, shapes), strict=True):
                    core.copy_(value if core.dim() == 4 else self._with_noise(value))
        return equal and self.init_noise == 0.0 and self.bond_dim is None
