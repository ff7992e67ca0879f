"""Residual experts: one core that all experts share, and a small residual of each.

    W_e = C + R_e        E_e(x) = W_down,e (act(W_gate,e x) * (W_up,e x)), biases likewise

The core can be trained densely, and the residuals be learnt later. From feed-forwards the core becomes their mean and
R_e what is left: copies of one have R_e = 0, and compute what it does. The router then breaks the symmetry, and the
`noise` of `from_host`, which goes into R_e. `convert_experts` to the kind `ffn` adds both. To freeze the core, switch
off the gradients of the parameters `core_*`.

A forward adds core and residuals, (2 + gate) f d additions for each expert that has tokens, and for all experts on
other backends than `"ragged"`.

Source: Residual Mixture of Experts, arXiv:2204.09636.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative
from ..computed_stacks import EVERY, Chosen, ComputedStacks
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..stacked_experts import copy_whole


def _sum_of(name: str) -> property:
    """Return the property of a stack of biases (E, ...), core and residuals added."""
    return property(lambda self: self.weight(name))


@register_experts("rmoe_residual")
class ResidualExperts(ComputedStacks):
    """Feed-forward experts stored as `core_<name>` (...) and `residual_<name>` (E, ...) of every stack.

    Args:
        residual_init_std: standard deviation of fresh residuals; those of experts that start as feed-forwards are
            what these differ from their mean.
    """

    gate_up_proj_bias, up_proj_bias, down_proj_bias = (
        _sum_of(f"{name}_bias") for name in ("gate_up_proj", "up_proj", "down_proj")
    )

    def __init__(self, config, spec: MoELayerSpec, *, residual_init_std: NonNegative = 1e-3):
        super().__init__(config, spec)
        self.residual_init_std = residual_init_std

    def add_stack(self, name: str, *shape: int) -> None:
        self.register_parameter(f"core_{name}", nn.Parameter(torch.empty(shape)))
        self.register_parameter(f"residual_{name}", nn.Parameter(torch.empty(self.num_experts, *shape)))

    def weight(self, name: str, experts: Chosen = EVERY) -> torch.Tensor:
        return getattr(self, f"core_{name}") + getattr(self, f"residual_{name}")[experts]

    def initialize(self, std: float) -> None:
        super().initialize(std)
        for name in self.stack_names:
            init.normal_(getattr(self, f"residual_{name}"), mean=0.0, std=self.residual_init_std)

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        for expert, state in enumerate(states):
            for name, tensor in state.items():
                copy_whole(getattr(self, f"residual_{name}")[expert], tensor, name)
        biases = [f"{name}_bias" for name in self.stack_names if self.has_bias]
        for name in self.stack_names + biases:
            core, residual = getattr(self, f"core_{name}"), getattr(self, f"residual_{name}")
            # The first expert plus a mean of differences: equal experts leave residuals of exactly zero.
            core.copy_(residual[0] + (residual - residual[0]).mean(0))
            residual -= core
        return True
