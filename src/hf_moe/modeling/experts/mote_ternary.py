"""Ternary experts: weights of -1, 0 and 1 times one scale per matrix, trained through latent ones of full precision.

    E_i(x) = W_down (act(W_gate x) * (W_up x))        each W read as a W_q, each of its inputs in 8 bits

as `ternary.py` defines them. Trained experts are packed once: `hf_moe.construction.packing.pack_experts` or
`hf-moe pack` puts 1.6 bits a weight in the place of the latent weights, and the model computes what it did. Packed
experts are stored so on disk and in memory, and do not learn. A forward unpacks those that have tokens, one layer at a
time (all of a layer on other backends than `"ragged"`).

Experts start as feed-forwards in their latent weights. The paper's stage has its dense feed-forward whole and frozen
as the shared branch, `y = FFN(x) + p_e E_e(x)`: `source={"name": "copies", "beside": 1.0}` of `from_host`, then
`train_only(model, ["routers", "experts/experts.*"])`.

Rounded inputs jump by a step where sums differ in the last bit, as those of two backends or batches may.

Source: MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models, arXiv:2506.14435.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import Interval
from ..computed_stacks import EVERY, Chosen, ComputedStacks
from ..decisions import Decision, ParameterMixture, SlotMixture
from ..dispatch import Dispatch
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..stacked_experts import copy_whole
from ..ternary import DIGITS_PER_BYTE, TokenRounding, pack, straight_through, ternary, unpack


@register_experts("mote_ternary")
class TernaryExperts(ComputedStacks):
    """Feed-forward experts of ternary weights.

    A stack is the parameter `<name>_latent` (E, out, in). Packed it is the buffers `<name>_digits` (E, out, in / 5),
    uint8, and `<name>_scale`. Biases are of full precision.

    Args:
        weight_scale: whether a scale is of a `"matrix"` or of each `"row"` of it.
        activation_bits (`int`, *optional*, defaults to 8): of what enters a projection; `None` leaves it as it is.
        packed (`bool`, *optional*, defaults to `False`): whether the experts are packed; `pack` sets it.

    Raises:
        ValueError: if packed experts are to start as feed-forwards.
    """

    can_be_packed = True

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        weight_scale: Literal["matrix", "row"] = "matrix",
        activation_bits: Annotated[int, Interval(2, 8)] | None = 8,
        packed: bool = False,
    ):
        # Both tell `add_stack` what to make.
        self.packed = packed
        self.scale_by_row = weight_scale == "row"
        super().__init__(config, spec)
        self.rounding = nn.Identity() if activation_bits is None else TokenRounding(activation_bits)
        if not self.has_gate:
            self.act_fn = nn.Sequential(self.act_fn, self.rounding)

    def add_stack(self, name: str, *shape: int) -> None:
        if len(shape) == 1:
            super().add_stack(name, *shape)
        elif not self.packed:
            super().add_stack(f"{name}_latent", *shape)
        else:
            rows, columns = shape
            parts = _matrices(name)
            digits = torch.empty(self.num_experts, rows, -(-columns // DIGITS_PER_BYTE), dtype=torch.uint8)
            scale = torch.empty(self.num_experts, parts, rows // parts if self.scale_by_row else 1, 1)
            self.register_buffer(f"{name}_digits", digits)
            self.register_buffer(f"{name}_scale", scale)

    def initialize(self, std: float) -> None:
        super().initialize(std)
        if self.packed:
            for name in self.stack_names:
                digits, scale = getattr(self, f"{name}_digits"), getattr(self, f"{name}_scale")
                init.copy_(digits, torch.randint_like(digits, 3**DIGITS_PER_BYTE))
                init.constant_(scale, std)

    def weight(self, name: str, experts: Chosen = EVERY) -> torch.Tensor:
        """Return the weights of some experts as they are read, (experts, out, in)."""
        if self.packed:
            columns = self.hidden_dim if name == self.input_name else self.intermediate_dim
            digits = unpack(getattr(self, f"{name}_digits")[experts], columns)
            return _scaled(digits, getattr(self, f"{name}_scale")[experts])
        latent = getattr(self, f"{name}_latent")[experts]
        digits, scale = self._ternary(name, latent)
        return straight_through(latent, _scaled(digits, scale.to(latent.dtype)))

    def _ternary(self, name: str, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the digits (E, out, in) of a stack and the scales (E, matrices, 1 or rows, 1)."""
        digits, scale = ternary(latent.unflatten(1, (_matrices(name), -1)), self.scale_by_row)
        return digits.flatten(1, 2), scale

    @torch.no_grad()
    def pack(self) -> None:
        for name in self.stack_names:
            latent = getattr(self, f"{name}_latent")
            digits, scale = self._ternary(name, latent)
            delattr(self, f"{name}_latent")
            self.register_buffer(f"{name}_digits", pack(digits))
            self.register_buffer(f"{name}_scale", scale.to(latent.dtype))
        self.packed = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        decision: Decision | torch.Tensor,
        expert_weight: torch.Tensor | None = None,
        *,
        dispatch: Dispatch | None = None,
    ) -> torch.Tensor:
        by_rows = self.takes_dispatch and not isinstance(decision, ParameterMixture)
        if not by_rows and not isinstance(decision, SlotMixture):
            hidden_states = self.rounding(hidden_states)  # else `compute` does it
        return super().forward(hidden_states, decision, expert_weight, dispatch=dispatch)

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return super().compute(self.rounding(tokens), dispatch)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.rounding(super()._apply_gate(gate_up))

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        if self.packed:
            raise ValueError(
                "Packed experts have no weights that could start as feed-forwards: leave packed out, and pack the "
                "model when it is trained (hf_moe.construction.packing.pack_experts)."
            )
        for expert, state in enumerate(states):
            for name, tensor in state.items():
                own = name if name.endswith("_bias") else f"{name}_latent"
                copy_whole(getattr(self, own)[expert], tensor, name)
        return False

    @property
    def packed_weights(self) -> int:
        inputs = _matrices(self.input_name) * self.hidden_dim
        return self.packed * self.num_experts * self.intermediate_dim * (inputs + self.output_dim)


def _matrices(name: str) -> int:
    """Return how many matrices a stack holds for each expert, one below the other."""
    return 2 if name.endswith("gate_up_proj") else 1


def _scaled(digits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return digits (E, out, in) times their scales (E, matrices, 1 or rows, 1), in the type of these."""
    return (digits.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1, 2)
