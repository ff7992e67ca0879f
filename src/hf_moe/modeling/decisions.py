"""The three kinds of routing decision: tokens choose experts, mixed slots, or experts merged into one."""

from dataclasses import dataclass, field

import torch


@dataclass
class ExpertAssignment:
    """Which experts each token uses, and how much of each.

    Attributes:
        expert_index (`torch.Tensor` of shape `(T, K)`, int64): the value `num_experts` marks an empty slot.
        expert_weight (`torch.Tensor` of shape `(T, K)`): 0 at empty slots.
        num_experts: E.
        router_logits (`torch.Tensor` of shape `(T, C)`, float32): C >= E candidates, the real experts first; -inf
            where a token may not choose a candidate.
        router_probs (`torch.Tensor` of shape `(T, C)`, float32): the same as probabilities; rows sum to 1.
        gate_index (`torch.Tensor` of shape `(T,)`, *optional*): which of several gates decided, in
            [0, NUM_MODALITIES). Every gate is a population of its own in the balance losses.
        chosen_index (`torch.Tensor` of shape `(T, K)`, *optional*): `expert_index` before a capacity emptied slots, or
            a self gate filled some. The balance statistics count these: a full expert must not look less wanted than
            it is.
        input_scale (`torch.Tensor` of shape `(T,)`, *optional*): multiplies what the experts see.
        identity_weight (`torch.Tensor` of shape `(T,)`, *optional*): weight of experts that return their input; they
            cost no matrix work and take no index.
        latents (`torch.Tensor` of shape `(T, E, r)`, *optional*): what every expert has computed of every token, for
            experts that go on from it. They take it out: it is large, and of this pass alone.
        signals: named per-token values of shape `(T,)`, for logs, pictures and objectives (importance, slots, ...).
    """

    expert_index: torch.Tensor
    expert_weight: torch.Tensor
    num_experts: int
    router_logits: torch.Tensor | None = None
    router_probs: torch.Tensor | None = None
    gate_index: torch.Tensor | None = None
    chosen_index: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    identity_weight: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def expert_probs(self) -> torch.Tensor:
        """`router_probs` as a distribution over the real experts alone, (T, E)."""
        probs = self.router_probs[:, : self.num_experts]
        return probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)

    def weight_table(self) -> torch.Tensor:
        """Return the weight of every expert for every token, (T, E)."""
        table = self.expert_weight.new_zeros(len(self.expert_index), self.num_experts + 1)
        return table.scatter_add(1, self.expert_index, self.expert_weight)[:, :-1]

    def drop(self, dropped: torch.Tensor) -> "ExpertAssignment":
        """Return the assignment with every slot of the `dropped` (T,) bool tokens emptied."""
        self.expert_index = self.expert_index.masked_fill(dropped[:, None], self.num_experts)
        self.expert_weight = self.expert_weight.masked_fill(dropped[:, None], 0.0)
        if self.chosen_index is not None:
            self.chosen_index = self.chosen_index.masked_fill(dropped[:, None], self.num_experts)
        if self.identity_weight is not None:
            self.identity_weight = self.identity_weight.masked_fill(dropped, 0.0)
        return self

    def slot_counts(self, group: torch.Tensor, num_groups: int, token_mask: torch.Tensor) -> torch.Tensor:
        """Count the chosen slots of real tokens, (num_groups, E) int64, detached."""
        return self.slot_table(group, num_groups, token_mask)[:, : self.num_experts]

    def slot_table(
        self, group: torch.Tensor, num_groups: int, token_mask: torch.Tensor, slots: int | None = None
    ) -> torch.Tensor:
        """Count the first `slots` of real tokens, (num_groups, E + 1) int64; the last column those without choice."""
        width = self.num_experts + 1
        index = (self.expert_index if self.chosen_index is None else self.chosen_index)[:, :slots]
        cell = group[:, None] * width + index.clamp(max=self.num_experts)  # (T, K)
        weight = token_mask[:, None].expand_as(cell).long()
        table = torch.zeros(num_groups * width, dtype=torch.long, device=cell.device)
        return table.scatter_add(0, cell.reshape(-1), weight.reshape(-1)).view(num_groups, width)


@dataclass
class SlotMixture:
    """Mixed slots within groups of tokens: B sequences of S as in Soft MoE, or B groups of S places given by `order`.

    Attributes:
        dispatch (`torch.Tensor` of shape `(B, S, N)`): weights of the tokens in each of the N = E * slots inputs.
        combine (`torch.Tensor` of shape `(B, S, N)`): weights of the slot outputs in each token.
        num_experts: E.
        order (`torch.Tensor` of shape `(B * S,)`, *optional*): which of the T tokens has a place in the groups, T for
            none. Tokens without a place get 0. `None` where all tokens have theirs, in order.
    """

    dispatch: torch.Tensor
    combine: torch.Tensor
    num_experts: int
    order: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ParameterMixture:
    """Experts are merged into one before use.

    Attributes:
        expert_weight (`torch.Tensor` of shape `(G, E)`): the share of every expert in the merged one of a group.
        group_index (`torch.Tensor` of shape `(T,)`): the group of every token.
        num_experts: E.
    """

    expert_weight: torch.Tensor
    group_index: torch.Tensor
    num_experts: int
    router_logits: torch.Tensor | None = None
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


Decision = ExpertAssignment | SlotMixture | ParameterMixture


def refuse_mixture(decision: Decision) -> ValueError:
    """Return the error of a mixture of experts of which this process holds a part."""
    return ValueError(
        f"A {type(decision).__name__} needs whole experts in every process, and a parallel plan has split them: pass "
        "`tp_plan={}` or `ep_size=1` in `DistributedConfig`, or choose a router that assigns experts."
    )
