"""Grove experts: a group of experts shares a small adjugate expert, which a token takes once.

    y = sum_{i in S} w_i E_i(x) + lambda sum_j v_j A_j(x)        v_j = sum of w_i over the chosen experts of group j

E experts form E / g groups of g neighbours. All are feed-forwards, A_j narrower than E_i. The sum is that of experts
E_i + lambda A_{i // g}, but A_j runs once for each token and group: between ceil(K / g) and min(K, E / g) times for a
token, which the signal `adjugates` counts. A token whose experts cluster costs less.

A mixture of slots goes to the adjugate expert slot by slot, and merged experts have one merged adjugate expert.
With `"zero_down"` the experts start as those without adjugate ones.

Source: Grove MoE: Towards Efficient and Superior MoE LLMs with Adjugate Experts, arXiv:2508.07785.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from transformers import initialization as init

from ...configuration.checks import NonNegative, PositiveInt
from ..decisions import Decision, ExpertAssignment, ParameterMixture, SlotMixture
from ..dispatch import Dispatch
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..stacked_experts import StackedExperts


@register_experts("grove_moe")
class GroveExperts(Experts):
    """Routed experts, and an adjugate one for each group of them.

    Args:
        experts_per_group (`int`, *optional*, defaults to 2): g.
        adjugate_size (`int`, *optional*, defaults to a sixth of an expert's width): the inner width of A_j.
        adjugate_scale (`float`, *optional*, defaults to 0.05): lambda.
        adjugate_init: `"zero_down"` starts from output projections of zero, `"normal"` from random ones.

    Raises:
        ValueError: if g does not divide E.
    """

    runs_by_signal = {"adjugate": "adjugates"}

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        experts_per_group: PositiveInt = 2,
        adjugate_size: PositiveInt | None = None,
        adjugate_scale: NonNegative = 0.05,
        adjugate_init: Literal["zero_down", "normal"] = "zero_down",
    ):
        super().__init__()
        if spec.num_experts % experts_per_group:
            raise ValueError(
                f"Layer {spec.layer_idx}: experts_per_group={experts_per_group} must divide num_experts="
                f"{spec.num_experts}."
            )
        groups = spec.num_experts // experts_per_group
        width = adjugate_size or max(1, spec.expert_intermediate_size // 6)
        self.num_experts = spec.num_experts
        self.group_size = experts_per_group
        self.scale = adjugate_scale
        self.starts_at_zero = adjugate_init == "zero_down"
        self.routed = StackedExperts(config, spec)
        self.adjugate = StackedExperts(config, replace(spec, num_experts=groups, expert_intermediate_size=width))

    def initialize(self, std: float) -> None:
        # Both parts have their first values already.
        if self.starts_at_zero:
            init.zeros_(self.adjugate.down_proj)

    def parameters_per_run(self) -> list[float]:
        return self.routed.parameters_per_run()

    @property
    def widths(self) -> list[int]:
        return self.routed.widths

    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        return self.routed.take(states, inputs) and self.starts_at_zero

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.adjugate.down_proj.any():
            raise ValueError("Experts with trained adjugate ones are no feed-forwards that others could start from.")
        return self.routed.states()

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:  # type: ignore[override]
        once = of_groups(decision, self.group_size)
        if not isinstance(decision, ExpertAssignment) or not self.routed.takes_dispatch:
            output, beside = self.routed(hidden_states, decision), self.adjugate(hidden_states, once)
        else:
            dispatch = Dispatch(decision.expert_index, decision.num_experts)
            groups = dispatch.to_groups(self.group_size, once.expert_index < once.num_experts)
            output = self.routed(hidden_states, decision, dispatch=dispatch)
            beside = self.adjugate(hidden_states, once, dispatch=groups)
        if isinstance(once, ExpertAssignment):
            decision.signals["adjugates"] = (once.expert_index < once.num_experts).sum(-1).float()
        return output + self.scale * beside


def of_groups(decision: Decision, size: int) -> Decision:
    """Return a decision among experts as one among groups of `size` neighbours, which weigh what their experts do.

    Of the slots of a token that have experts of one group, the first is that of the group.
    """
    groups = decision.num_experts // size
    if isinstance(decision, SlotMixture):
        return replace(decision, num_experts=groups)  # the slots of a group are side by side already
    if isinstance(decision, ParameterMixture):
        weight = decision.expert_weight.unflatten(-1, (groups, size)).sum(-1)
        return replace(decision, expert_weight=weight, num_experts=groups)
    group = decision.expert_index // size  # (T, K), the number of groups at empty slots
    same = group[:, :, None] == group[:, None]  # (T, K, K)
    first = ~same.tril(-1).any(-1)
    weight = (same * decision.expert_weight[:, None]).sum(-1)
    return ExpertAssignment(group.masked_fill(~first, groups), weight * first, groups)
