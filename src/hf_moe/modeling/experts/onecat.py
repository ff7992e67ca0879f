"""Experts of three roles: text, images that are read, and images that are drawn, which each scale adapts.

    E_0, E_1, E_2 are feed-forwards        E_{2+s} is E_2 with W + B_s A_s for each of its projections W

Scale s of a drawn image is expert 2 + s, so one id of a token says its role and scale, and a router such as
`condition` chooses by it. B_s (out, r) starts at zero, A_s (r, in) at random: all scales start alike. A gated expert
takes gate and up projection as one W. The products with W run once for all scales.

To start as feed-forwards, the three take theirs, and all scales must be copies of one.

Source: OneCAT: Decoder-Only Auto-Regressive Model for Unified Understanding and Generation, arXiv:2509.03498.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..dispatch import Dispatch, grouped_linear, run_stacks
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..stacked_experts import StackedExperts


ROLES = 3
DRAWN = 2  # the role of images that are drawn


@register_experts("onecat")
class RoleExperts(Experts):
    """Three feed-forwards, and low-rank adapters of the last one.

    Args:
        scale_adapter_rank (`int`, *optional*, defaults to 64): r.

    Raises:
        ValueError: if there are fewer than three experts.
    """

    def __init__(self, config, spec: MoELayerSpec, *, scale_adapter_rank: PositiveInt = 64):
        super().__init__()
        if spec.num_experts < ROLES:
            raise ValueError(
                f"Layer {spec.layer_idx}: num_experts={spec.num_experts} must be 2 and the number of scales, at least "
                f"{ROLES}: text, images that are read, and one for each scale of those that are drawn."
            )
        self.num_experts = spec.num_experts
        self.num_scales = spec.num_experts - DRAWN
        self.roles = StackedExperts(config, replace(spec, num_experts=ROLES))
        self.adapters = nn.ParameterDict()
        for name in (self.roles.input_name, "down_proj"):
            outputs, inputs = getattr(self.roles, name).shape[1:]
            self.adapters[f"{name}_a"] = nn.Parameter(torch.empty(self.num_scales, scale_adapter_rank, inputs))
            self.adapters[f"{name}_b"] = nn.Parameter(torch.empty(self.num_scales, outputs, scale_adapter_rank))

    def initialize(self, std: float) -> None:
        for name, parameter in self.adapters.items():
            init.normal_(parameter, mean=0.0, std=std if name.endswith("_a") else 0.0)

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        ends = dispatch.offsets  # (E,), and the rows of all scales come last
        of_roles = torch.cat([ends[:DRAWN], ends[-1:]])
        first = int(ends[DRAWN - 1])
        of_scales = ends[DRAWN:] - first

        def project(experts: StackedExperts, name: str, rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
            bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
            output = grouped_linear(rows, getattr(experts, name), of_roles, bias)  # (M, out)
            low = grouped_linear(rows[first:], self.adapters[f"{name}_a"], of_scales)  # (rows of scales, r)
            drawn = output[first:] + grouped_linear(low, self.adapters[f"{name}_b"], of_scales)
            return torch.cat([output[:first], drawn])

        return run_stacks(self.roles, tokens, dispatch, project)

    def parameters_per_run(self) -> list[float]:
        role = sum(parameter.numel() for parameter in self.roles.parameters()) / ROLES
        scale = sum(parameter.numel() for parameter in self.adapters.values()) / self.num_scales
        return [role] * DRAWN + [role + scale] * self.num_scales

    @property
    def widths(self) -> list[int]:
        return [self.roles.intermediate_dim] * self.num_experts

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        states = iter(states)
        self.roles.take(islice(states, ROLES))
        drawn = list(self.roles.states())[DRAWN]
        return all([torch.equal(state[name].to(own), own) for state in states for name, own in drawn.items()])

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        *others, drawn = self.roles.states()
        yield from others
        for scale in range(self.num_scales):
            state = dict(drawn)
            for name in (self.roles.input_name, "down_proj"):
                state[name] = drawn[name] + self.adapters[f"{name}_b"][scale] @ self.adapters[f"{name}_a"][scale]
            yield state
