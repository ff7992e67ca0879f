"""Feature-modulated experts: one feed-forward that all experts share, before which each modulates the features.

    z = act(A x) * (B x), or x itself
    E_i(z) = (1 + G_i z + g_i) * z + H_i z + h_i        y = F(sum_{i in S} w_i E_i(z))

The mixture is formed before F, the host's feed-forward of the experts' width: F runs once for a token, whatever the
number of experts or slots. G_i and H_i (d, d) are as they are (`"full"`, the paper's), of rank r with one input map,
[G_i; H_i] = U_i V_i (`"lowrank"`), or left out (`"vector"`). The paper's E_i cost 2 d^2 parameters each; one input map
serves both in 3 r d, as scale and shift depend on the same features.

What reaches the layer is normalised by the host, so there is no norm of its own before A and B. To start as
feed-forwards, F takes the first one and the modulations start at zero; with `base_block="identity"`, copies of one and
weights that sum to 1 the layer computes what it did. A token without any expert gets 0.

The modulations run on the dispatch of `ragged`, whichever backend is set; F is no routed expert and has none. Training
and inference are the same, and no token depends on another.

Source: Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation, arXiv:2312.16610;
its uncertainty-aware router is the router `mofme`.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ...configuration.checks import PositiveInt
from ..clamped_unit import ClampedUnit
from ..decisions import Decision, ExpertAssignment
from ..dispatch import Dispatch
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts
from ..shared_experts import SharedExperts
from ..stacked_experts import copy_whole


@register_experts("mofme")
class ModulationExperts(Experts):
    """Modulations of the features in front of one feed-forward.

    Args:
        modulation: `"full"`, `"lowrank"` or `"vector"`, as above.
        modulation_rank: r of `"lowrank"`.
        base_block: `"glu"`, the gated block of the paper, or `"identity"`, to start as feed-forwards.
    """

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        modulation: Literal["full", "lowrank", "vector"] = "lowrank",
        modulation_rank: PositiveInt = 16,
        base_block: Literal["glu", "identity"] = "glu",
    ):
        super().__init__()
        self.num_experts, width = spec.num_experts, spec.hidden_size
        self.act_fn = ACT2FN[spec.hidden_act]
        self.base_proj = nn.Linear(width, 2 * width, bias=False) if base_block == "glu" else None
        self.modulation_in = self.modulation_out = None
        inner = width
        if modulation == "lowrank":
            inner = modulation_rank
            self.modulation_in = nn.Parameter(torch.empty(self.num_experts, inner, width))
        if modulation != "vector":
            self.modulation_out = nn.Parameter(torch.empty(self.num_experts, 2 * width, inner))
        self.modulation_bias = nn.Parameter(torch.empty(self.num_experts, 2 * width))
        self.trunk = SharedExperts(spec, spec.expert_intermediate_size, False, ClampedUnit())

    def initialize(self, std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, decision: Decision) -> torch.Tensor:  # type: ignore[override]
        features = hidden_states
        if self.base_proj is not None:
            gate, up = self.base_proj(hidden_states).chunk(2, dim=-1)  # (T, d) both
            features = self.act_fn(gate) * up
        output = self.trunk(super().forward(features, decision))
        if isinstance(decision, ExpertAssignment):  # biases of the trunk would give a token without experts something
            output = output.masked_fill((decision.expert_index == self.num_experts).all(-1, keepdim=True), 0.0)
        return output

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        rows = dispatch.rows(tokens)  # (M, d)
        bias = self.modulation_bias
        if self.modulation_out is None:
            modulation = bias.index_select(0, dispatch.expert).to(rows.dtype)  # (M, 2d)
        else:
            inner = rows if self.modulation_in is None else dispatch.linear(rows, self.modulation_in)
            modulation = dispatch.linear(inner, self.modulation_out, bias)
        scale, shift = modulation.chunk(2, dim=-1)
        return rows + scale * rows + shift

    def parameters_per_token(self) -> int:
        layers = [self.trunk] if self.base_proj is None else [self.trunk, self.base_proj]
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    @property
    def widths(self) -> list[int]:
        return [self.trunk.up_proj.out_features] * self.num_experts

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        states = iter(states)
        first = next(states)
        equal = all(torch.equal(state[name], tensor) for state in states for name, tensor in first.items())
        for name, tensor in first.items():
            kind = "bias" if name.endswith("_bias") else "weight"
            stack = name.removesuffix("_bias")
            layers = ["gate_proj", "up_proj"] if stack == "gate_up_proj" else [stack]
            for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
                copy_whole(getattr(self.trunk.get_submodule(layer), kind), part, name)
        for modulation in (self.modulation_out, self.modulation_bias):
            if modulation is not None:
                modulation.zero_()
        return equal and self.base_proj is None
