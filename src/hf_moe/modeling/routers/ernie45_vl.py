"""ERNIE-4.5-VL routing: text and vision tokens have banks of experts of their own.

    p = softmax(W_bank x)  over the experts of the token's bank        S = the K largest of p + b
    w_i = p_i / max(sum_{j in S} p_j, norm_min)        for i in S

Image and video tokens see the vision bank, all others the text bank. Each bank may have a width of its own (vision
experts are a third as wide in the released models): name the banks in `moe_config.expert_banks`, text first. The bias
b moves the choice, has no gradient, and follows the load of its own bank.

Source: ERNIE 4.5 Technical Report (2025), and Transformers' `ernie4_5_vl_moe`.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, NonNegativeInt, Positive
from ..bias_balancing import BiasBalancedRouter
from ..decisions import ExpertAssignment
from ..gating import assign, bank_sizes, gate_logits, is_vision, mask_other_bank, row_overlap
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing_context import RoutingContext, is_one_of


@register_router("ernie45_vl")
class Ernie45VLRouter(BiasBalancedRouter):
    """Two isolated softmax gates with a balancing bias, top-k in the bank of the token.

    The rows of `weight` (E, d) follow the experts: the text bank first, then the vision bank.

    Args:
        spec: facts of the layer. `banks` has two entries, text and vision; without banks E is split in two halves.
        norm_min: least divisor of the weights, > 0.
        bias_update_rate: step of the bias, >= 0; 0 freezes it.
        boundary_token_ids: tokens that count as vision although their modality is text (start and end of an image or
            video); needs `input_ids`.

    Raises:
        ValueError: if there are not two banks of at least K experts each; in `forward`, if `boundary_token_ids` are
            set and the model was called without `input_ids`.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        norm_min: Positive = 1e-12,
        bias_update_rate: NonNegative = 0.001,
        boundary_token_ids: list[NonNegativeInt] | None = None,
    ):
        super().__init__(spec, (spec.num_experts,), bias_update_rate)
        self.bank_sizes = bank_sizes(spec, "ernie45_vl")
        self.norm_min = norm_min
        self.boundary_token_ids = boundary_token_ids or []
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.normal_(self.weight, mean=0.0, std=std)

    def balanced_together(self, load: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return load.split(self.bank_sizes, dim=-1)

    def in_vision_bank(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return which tokens see the vision bank, (T,) bool."""
        vision = is_vision(context, device)
        if not self.boundary_token_ids:
            return vision
        if context.input_ids is None:
            raise ValueError(
                "Router 'ernie45_vl' has boundary_token_ids and finds the tokens by input_ids: pass input_ids, not "
                "inputs_embeds, or leave the option out."
            )
        return vision | is_one_of(context.input_ids.reshape(-1).to(device), self.boundary_token_ids)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        device = hidden_states.device
        gate_index = self.in_vision_bank(context, device).long()  # (T,)
        logits = mask_other_bank(gate_logits(hidden_states, self.weight), gate_index, self.bank_sizes)  # (T, E)
        assignment = assign(
            logits,
            self.spec,
            context,
            bias=self.e_score_correction_bias,
            norm_min=self.norm_min,
            gate_index=gate_index,
        )
        if "gate_overlap" in context.wanted:
            overlaps = [row_overlap(rows) for rows in self.weight.split(self.bank_sizes)]
            assignment.signals["gate_overlap"] = torch.stack(overlaps).mean().expand(len(logits))  # (T,)
        return assignment
