"""HoME routing: a gate for every modality or task, over the experts that it may see, and one beside it for its own.

    p = softmax over the experts e that gate j sees of W_{j,e} x        S = the K largest of p
    w_e = p_e / sum_{i in S} p_i for e in S, else 0
    w_e += s_e for the experts e that gate j alone sees        s_e = sigmoid(V_e x), a softmax where they are several

j is the gate of the token's modality, or the task of its row. The experts that all gates see are shared ones, those
that some see belong to a group, and what one alone sees is specific: `experts_of` is the hierarchy. The self gate s
hands every token of j to the experts of j, so these learn however rare j is and whatever the other gate chooses. It
is added to the weights of the decision: an expert runs once for a token.

Both parts work without the other, besides that the self gate needs specific experts. Balance losses count what the
softmax chose. A row whose id is not known gets no expert. Training and inference are the same, and no token depends on
another.

Source: HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, arXiv:2408.05430.
"""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt
from ..decisions import ExpertAssignment
from ..gating import (
    apply_overrides,
    assign,
    by_modality,
    from_mask,
    gate_logits,
    gates_of,
    per_gate_logits,
    seen_logits,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("home")
class HomeRouter(Router):
    """Softmax gates `weight` (J, E, d) over the experts that each sees, `visible` (J, E) bool, top-k.

    Args:
        experts_of (`list[list[int]]`, *optional*): the experts that each gate sees; all of them when `None`.
        self_gate (`bool`, *optional*, defaults to `False`): whether the experts that one gate alone sees have a self
            gate, `self_weight` (E, d); its rows of other experts are never used.
        conditioning (`str`, *optional*, defaults to `"modality"`): what has a gate: the `"modality"` of the token, or
            a `"condition"` of the row.
        modalities (`list[str]`, *optional*, defaults to text and image): the modalities with a gate of their own, text
            first. Video shares the image gate unless it is named; others without a gate share the text gate.
        condition (`str`, *optional*, defaults to `"task"`): name of the condition in the call's `condition_ids`.
        num_conditions (`int`, *optional*, defaults to 2): how many ids it has.

    Raises:
        ValueError: if `experts_of` does not name at least K experts for every gate, or there is to be a self gate and
            every expert is seen by several gates or none.
    """

    visible: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        experts_of: list[list[NonNegativeInt]] | None = None,
        self_gate: bool = False,
        conditioning: Literal["modality", "condition"] = "modality",
        modalities: list[str] | tuple[str, ...] = ("text", "image"),
        condition: str = "task",
        num_conditions: PositiveInt = 2,
    ):
        super().__init__(spec)
        self.reads = frozenset({"hidden_states", conditioning})
        gates = len(modalities)
        if conditioning == "condition":
            gates = self.num_conditions = num_conditions
            self.condition = condition
        else:
            self.gate_of_modality = gates_of(modalities)
        self.experts_of = [list(range(spec.num_experts))] * gates if experts_of is None else experts_of
        enough = all(len(set(seen)) >= spec.num_experts_per_tok for seen in self.experts_of)
        if len(self.experts_of) != gates or not enough or max(map(max, self.experts_of)) >= spec.num_experts:
            raise ValueError(
                f"Router 'home' of layer {spec.layer_idx}: experts_of={experts_of} must name, for each of {gates} "
                f"gates, at least num_experts_per_tok={spec.num_experts_per_tok} experts in [0, {spec.num_experts})."
            )
        every = [expert for seen in self.experts_of for expert in set(seen)]
        self.num_own = max(sum(every.count(expert) == 1 for expert in set(seen)) for seen in self.experts_of)
        if self_gate and self.num_own == 0:
            raise ValueError(
                f"Router 'home' of layer {spec.layer_idx}: self_gate=True needs an expert that one gate alone sees, "
                f"and experts_of={experts_of} has none: give each gate experts of its own, or leave self_gate out."
            )
        self.weight = nn.Parameter(torch.empty(gates, spec.num_experts, spec.hidden_size))
        self.self_weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size)) if self_gate else None
        self.register_buffer("visible", torch.empty(gates, spec.num_experts, dtype=torch.bool))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.self_weight is not None:
            init.normal_(self.self_weight, mean=0.0, std=std)
        visible = torch.zeros(self.visible.shape, dtype=torch.bool, device="cpu")
        for gate, seen in enumerate(self.experts_of):
            visible[gate, seen] = True
        init.copy_(self.visible, visible)

    def most_experts_per_tok(self) -> int:
        more = 0 if self.self_weight is None else self.num_own
        return min(self.spec.num_experts_per_tok + more, self.spec.num_experts)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        known, device = None, hidden_states.device
        if self.condition is None:
            gate = by_modality(self.gate_of_modality, context, device)  # (T,)
        else:
            ids = context.condition(self.condition, device)
            known = (ids >= 0) & (ids < len(self.weight))
            gate = ids.masked_fill(~known, 0)
        logits = per_gate_logits(hidden_states, self.weight, gate)  # (T, E)
        logits = seen_logits(logits, self.visible[gate], self.spec, context)
        assignment = assign(logits, self.spec, context, gate_index=gate if known is None else None)
        if self.self_weight is not None:
            assignment.chosen_index = assignment.expert_index
            table = assignment.weight_table() + self._self_gate(hidden_states, gate, context)  # (T, E)
            most = self.most_experts_per_tok()
            assignment.expert_index, assignment.expert_weight = from_mask(table > 0.0, table, most)
        return assignment if known is None else assignment.drop(~known)

    def _self_gate(self, hidden_states: torch.Tensor, gate: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return what the self gate of every token adds to the weights of the experts, (T, E)."""
        own = (self.visible & (self.visible.sum(0) == 1))[gate]  # (T, E)
        scores = gate_logits(hidden_states, self.self_weight)
        # Masked by a finite value: a softmax over nothing would have no gradient.
        shares = scores.masked_fill(~own, torch.finfo(scores.dtype).min).softmax(-1)
        added = torch.where(own.sum(-1, keepdim=True) > 1, shares, scores.sigmoid())
        return added.masked_fill(~(own & apply_overrides(scores, self.spec, context).isfinite()), 0.0)
