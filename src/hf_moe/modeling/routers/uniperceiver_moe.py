"""Conditional routing: the gate reads a condition of the token and not the token, and the experts are merged for it.

    c = LayerNorm(A a + b), a the attributes;  or an embedding of the task;  or one of the token's modality
    p = softmax(W c + noise)        S = the K largest of p        g_e = p_e / sum over S of p        for e in S
    every linear map of the feed-forward:  W_merged = sum_{e in S} g_e W_e

Tokens of equal condition have equal weights. An expert is not a whole feed-forward: its maps are banks of E matrices
with one decision for all, and a bank is linear in its matrix, so that one merged matrix for each condition computes
what the mixture of the bank's outputs is. Merging costs E matrices for each condition of a call, in training and at
inference alike. With K = 1 the gate keeps its probability. The noise is normal, in training alone, and one draw serves
all tokens of a condition. There is no balance loss: the conditions decide what is used.

The attributes are bits. Those of a row come with the call, (B, A): what the inputs and what the targets contain, and
how attention looks, say. Two more are the token's own, whether it is of an image and whether it is of text.

Source: Uni-Perceiver-MoE: Learning Sparse Generalist Models with Conditional MoEs, arXiv:2206.04674, and its released
code. Its gate on tokens is `top_k`.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegative, PositiveInt
from ..decisions import ExpertAssignment, ParameterMixture
from ..gating import apply_overrides, check_slots, gate_logits, renormalise, select_experts
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext


@register_router("uniperceiver_moe")
class ConditionalRouter(Router):
    """Top-k by condition, for experts that are merged.

    Args:
        level: `"attribute"`, `"task"` or `"modality"`.
        condition: name of the attributes, or of the task ids, in the call's `condition_ids`; `level` when absent.
        num_attributes: A, without the two of the token.
        num_tasks: number of tasks; rows with a negative id use no expert.
        gate_noise_std: standard deviation of the noise; 1 / E when absent.
        merge: merge the experts of a condition. Otherwise a token has the mixture of its experts' outputs, the same
            where an expert is one linear map: LoRA experts need that.

    Raises:
        ValueError: if K does not lie in [1, E]; in `forward`, if the call does not give the condition.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        level: Literal["attribute", "task", "modality"] = "attribute",
        condition: str | None = None,
        num_attributes: PositiveInt = 6,
        num_tasks: PositiveInt = 8,
        gate_noise_std: NonNegative | None = None,
        merge: bool = True,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "uniperceiver_moe")
        self.level = level
        self.reads = frozenset(
            {"attribute": {"condition", "modality"}, "task": {"condition"}}.get(level, {"modality"})
        )
        if level != "modality":
            self.condition = condition or level
        self.gate_noise_std = 1.0 / spec.num_experts if gate_noise_std is None else gate_noise_std
        self.merge = merge
        self.gate = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        if level == "attribute":
            self.num_condition_features = num_attributes
            self.projection = nn.Linear(num_attributes + 2, spec.hidden_size)
            self.norm = nn.LayerNorm(spec.hidden_size)
        else:
            self.num_conditions = num_tasks if level == "task" else 0
            self.embedding = nn.Parameter(torch.empty(self.num_conditions or NUM_MODALITIES, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.gate, mean=0.0, std=std)
        if self.level == "attribute":
            init.normal_(self.projection.weight, mean=0.0, std=std)
            init.zeros_(self.projection.bias)
            init.ones_(self.norm.weight)
            init.zeros_(self.norm.bias)
        else:
            init.normal_(self.embedding, mean=0.0, std=std)

    def conditions(self, context: RoutingContext, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the conditions (C, d), and which of them is every token's, (T,), -1 for none."""
        if self.level == "task":
            return self.embedding, context.condition(self.condition, device)
        modality = context.tokens("modality_ids", device)
        if self.level == "modality":
            return self.embedding, modality
        rows, positions = context.token_mask.shape
        given = context.condition_features(self.condition, device)[::positions].float()  # (B, A)
        given, row = given.unique(dim=0, return_inverse=True)  # (U, A), (B,)
        kind = torch.arange(NUM_MODALITIES, device=device)
        own = torch.stack([(kind == 1) | (kind == 2), kind == 0], dim=1).float()  # (M, 2)
        shape = (len(given), NUM_MODALITIES, -1)
        bits = torch.cat([given[:, None].expand(shape), own.expand(shape)], dim=-1).flatten(0, 1)  # (U * M, A + 2)
        projected = gate_logits(bits, self.projection.weight, self.projection.bias)
        return self.norm(projected), row.repeat_interleave(positions) * NUM_MODALITIES + modality

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ParameterMixture | ExpertAssignment:
        conditions, group = self.conditions(context, hidden_states.device)
        logits = gate_logits(conditions, self.gate)  # (C, E)
        if self.training and self.gate_noise_std > 0.0:
            logits = logits + self.gate_noise_std * torch.randn_like(logits)
        logits = apply_overrides(logits, self.spec, context)
        probs = logits.softmax(-1)
        index, weight = select_experts(probs, logits, self.spec)  # (C, K) both
        weight = renormalise(weight) if weight.shape[-1] > 1 else weight
        experts, known = self.spec.num_experts, group.clamp(min=0)
        if not self.merge:
            decision = ExpertAssignment(
                index[known], weight[known], experts, router_logits=logits[known], router_probs=probs[known]
            )
            return decision.drop(group < 0)
        gates = weight.new_zeros(len(logits) + 1, experts + 1)  # the last row is that of tokens without a condition
        gates = gates.scatter(1, F.pad(index, (0, 0, 0, 1)), F.pad(weight, (0, 0, 0, 1)))[:, :-1]
        used, merged = group.masked_fill(group < 0, len(logits)).unique(return_inverse=True)  # (G,), (T,)
        return ParameterMixture(gates[used], merged, experts, router_logits=logits[known])
