"""Experts of HoME: outputs of one scale, and for each expert a view of its own of the features.

    E_e(x) = norm_e(FFN_e(x * 2 sigmoid(B_e A_e x)))        A_e (r, d), B_e (d, r)

norm_e is an RMS norm with a gain of its own, (d,), before the gate weighs the output: no expert outweighs the others
by its scale. The feature gate lets experts that many modalities or tasks share read other features than those of one;
B_e = 0 at first, where the factor is exactly 1. Each part works without the other, and without both these are the
experts `ffn`. The mask and the self gate of the paper are parts of the router `home`.

The norm differs from expert to expert, and the gate precedes what a backend of Transformers computes: the experts run
on the dispatch of `ragged`, whichever backend is set. Training and inference are the same. Experts that start as
feed-forwards compute what those do unless their outputs are normalised.

Source: HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, arXiv:2408.05430.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt
from ..dispatch import Dispatch, run_stacks, stack_linear
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..stacked_experts import StackedExperts


@register_experts("home")
class HomeExperts(Experts):
    """Feed-forwards with a norm after each and a feature gate before it.

    Args:
        expert_norm: `"rms"`, or `"none"`.
        feature_gate_rank: r of the feature gate; 0 for none.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        expert_norm: Literal["rms", "none"] = "rms",
        feature_gate_rank: NonNegativeInt = 0,
    ):
        super().__init__()
        self.num_experts = spec.num_experts
        self.ffn = StackedExperts(config, spec)
        shape = spec.num_experts, feature_gate_rank, spec.hidden_size
        self.norm_weight = self.feature_gate_A = self.feature_gate_B = None
        if expert_norm == "rms":
            self.norm_weight = nn.Parameter(torch.empty(spec.num_experts, spec.output_size or spec.hidden_size))
        if feature_gate_rank:
            self.feature_gate_A = nn.Parameter(torch.empty(shape))
            self.feature_gate_B = nn.Parameter(torch.empty(shape).mT.contiguous())

    def initialize(self, std: float) -> None:
        # The feed-forwards have their first values already.
        if self.norm_weight is not None:
            init.ones_(self.norm_weight)
        if self.feature_gate_A is not None:
            init.normal_(self.feature_gate_A, mean=0.0, std=std)
            init.zeros_(self.feature_gate_B)

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        rows = run_stacks(self.ffn, tokens, dispatch, self._project)  # (M, d)
        if self.norm_weight is None:
            return rows
        normalised = F.rms_norm(rows.float(), rows.shape[-1:], eps=1e-6)
        return (normalised * self.norm_weight.float().index_select(0, dispatch.expert)).to(rows.dtype)

    def _project(self, experts: Any, name: str, rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        if self.feature_gate_A is not None and name == experts.input_name:
            gate = dispatch.linear(dispatch.linear(rows, self.feature_gate_A), self.feature_gate_B)  # (M, d)
            rows = rows * 2 * gate.sigmoid()
        return stack_linear(experts, name, rows, dispatch)

    @property
    def widths(self) -> list[int]:
        return self.ffn.widths

    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        return self.ffn.take(states, inputs) and self.norm_weight is None
