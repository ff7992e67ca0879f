"""Residual experts: one core that all experts share, and a small residual of each.

    W_e = C + R_e        E_e(x) = W_down,e (act(W_gate,e x) * (W_up,e x)), biases likewise

The core can be trained densely, and the residuals be learnt later. From feed-forwards the core becomes their mean and
R_e what is left: copies of one have R_e = 0, and compute what it does. The router then breaks the symmetry, and the
`noise` of `from_host`, which goes into R_e. `convert_experts` to the kind `ffn` adds both. To freeze the core, switch
off the gradients of the parameters `core_*`.

A forward adds core and residuals once for all experts, E (2 + gate) f d additions, and any backend runs the sums.

Source: Residual Mixture of Experts, arXiv:2204.09636.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..stacked_experts import StackedExperts, copy_whole


def _sum_of(name: str) -> property:
    """Return the property of a stack (E, ...), core and residuals added."""
    return property(lambda self: getattr(self, f"core_{name}") + getattr(self, f"residual_{name}"))


@register_experts("rmoe_residual")
class ResidualExperts(StackedExperts):
    """Feed-forward experts stored as `core_<name>` (...) and `residual_<name>` (E, ...) of every stack.

    Args:
        residual_init_std: standard deviation of fresh residuals; those of experts that start as feed-forwards are
            what these differ from their mean.
    """

    gate_up_proj, up_proj, down_proj = (_sum_of(name) for name in ("gate_up_proj", "up_proj", "down_proj"))
    gate_up_proj_bias, up_proj_bias, down_proj_bias = (
        _sum_of(f"{name}_bias") for name in ("gate_up_proj", "up_proj", "down_proj")
    )

    def __init__(self, config, spec: MoELayerSpec, *, residual_init_std: NonNegative = 1e-3):
        super().__init__(config, spec)
        self.residual_init_std = residual_init_std

    def add_stack(self, name: str, *shape: int) -> None:
        self.register_parameter(f"core_{name}", nn.Parameter(torch.empty(shape)))
        self.register_parameter(f"residual_{name}", nn.Parameter(torch.empty(self.num_experts, *shape)))

    @property
    def stack_names(self) -> list[str]:
        """The names of the stacks, without `core_` or `residual_`."""
        names = (name for name, _ in self.named_parameters(recurse=False))
        return [name.removeprefix("core_") for name in names if name.startswith("core_")]

    def initialize(self, std: float) -> None:
        super().initialize(std)
        for name in self.stack_names:
            if not name.endswith("_bias"):
                init.normal_(getattr(self, f"residual_{name}"), mean=0.0, std=self.residual_init_std)

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        for expert, state in enumerate(states):
            for name, tensor in state.items():
                copy_whole(getattr(self, f"residual_{name}")[expert], tensor, name)
        for name in self.stack_names:
            core, residual = getattr(self, f"core_{name}"), getattr(self, f"residual_{name}")
            # The first expert plus a mean of differences: equal experts leave residuals of exactly zero.
            core.copy_(residual[0] + (residual - residual[0]).mean(0))
            residual -= core
        return True

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        for expert in range(self.num_experts):
            yield {
                name: getattr(self, f"core_{name}") + getattr(self, f"residual_{name}")[expert]
                for name in self.stack_names
            }

    def parameters_per_run(self) -> list[float]:
        # Core and residual are added before a token is multiplied with them.
        count = sum(getattr(self, f"core_{name}").numel() for name in self.stack_names)
        return [float(count)] * self.num_experts

    def parallel_plans(self) -> dict[str, dict[str, str]]:
        return Experts.parallel_plans(self)

    def _width_share(self) -> float:
        return 1.0  # no plan splits them
