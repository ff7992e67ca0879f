"""Feed-forward experts: the experts of almost every published system.

    gated:  y = W_down (act(W_gate x) * (W_up x))        plain:  y = W_down act(W_up x)

each projection with or without a bias, and the gated unit bounded where the host's is (`clamped_unit.py`). Weights are
stored stacked, as Transformers stores those of its own MoE models (`gate_up_proj` (E, 2f, d) with the gate first,
`up_proj` (E, f, d), `down_proj` (E, d, f), each with `_bias`), so that PEFT's `target_parameters`, expert-parallel
plans, quantisers and weight loaders apply unchanged.
"""

from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...configuration.checks import Interval, Positive
from ..clamped_unit import ClampedUnit
from ..decisions import Decision, ExpertAssignment, ParameterMixture, SlotMixture, refuse_mixture
from ..dispatch import RAGGED, SortedSlots, compute_dtype, run_sorted
from ..layer_spec import MoELayerSpec
from ..registry import register_experts
from ..routing import Experts


@register_experts("ffn")
class FfnExperts(Experts):
    """One bank of feed-forward experts of one width.

    Args:
        config: the outer `HfMoeConfig`; its `_experts_implementation` picks the backend at every call.
        spec: facts of the layer.
        dropout: expert dropout: while training, the share of an expert's inner neurons that is dropped per token.
        limit: bounds what a gated expert multiplies, see [`ClampedUnit`]; `None` bounds nothing.
        shared_limit: the same for the shared branch.
        order: whether the gate is clamped `"before"` its activation or `"after"` it.
        alpha: takes the place of the host's activation, see [`ClampedUnit`].

    Raises:
        ValueError: if experts without a gate are to be clamped, or `alpha` is given with `dropout`.
    """

    takes_index_and_weight = True

    def __init__(
        self,
        config,
        spec: MoELayerSpec,
        *,
        dropout: Annotated[float, Interval(0, 1, open_maximum=True)] = 0.0,
        limit: Positive | None = None,
        shared_limit: Positive | None = None,
        order: Literal["before", "after"] = "before",
        alpha: Positive | None = None,
    ):
        super().__init__()
        clamped = any(value is not None for value in (limit, shared_limit, alpha))
        if clamped and not spec.gated:
            raise ValueError(
                f"Layer {spec.layer_idx}: limit, shared_limit and alpha are of experts with a gate, and the "
                "feed-forward of this host has none: leave them out."
            )
        if alpha is not None and dropout > 0.0:
            raise ValueError(
                "Expert dropout acts behind the activation, whose place alpha takes: leave one of them out."
            )
        self.unit = ClampedUnit(limit, order, alpha) if clamped else None
        self.shared_unit = ClampedUnit(shared_limit, order, alpha) if clamped else None
        self.config = config
        self.num_experts = spec.num_experts
        self.hidden_dim = spec.hidden_size
        self.intermediate_dim = spec.expert_intermediate_size
        # Instance flags that Transformers' backends read; their decorator would overwrite them per class.
        self.has_gate = spec.gated
        self.has_bias = spec.bias
        self.has_post_expert_norm = False
        self.is_transposed = False
        self.is_concatenated = True
        # What makes the stock backends skip the index E of an empty slot instead of crashing or returning NaN.
        self._is_expert_parallel = True
        self.act_fn = ACT2FN[spec.hidden_act]
        if dropout > 0.0:
            # The activation is the one step that every backend takes through this module.
            self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(dropout))

        inner = 2 * self.intermediate_dim if self.has_gate else self.intermediate_dim
        self.input_name = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(self.input_name, nn.Parameter(torch.empty(self.num_experts, inner, self.hidden_dim)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        if self.has_bias:
            self.register_parameter(f"{self.input_name}_bias", nn.Parameter(torch.empty(self.num_experts, inner)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def initialize(self, std: float) -> None:
        init.normal_(getattr(self, self.input_name), mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)
        if self.has_bias:
            init.zeros_(getattr(self, f"{self.input_name}_bias"))
            init.zeros_(self.down_proj_bias)

    @property
    def runs_sorted_slots(self) -> bool:
        # A forward that a parallel plan has put in its place takes index and weight alone.
        return self.config._experts_implementation == RAGGED and "forward" not in vars(self)

    def parallel_plans(self) -> dict[str, dict[str, str]]:
        # Stacked weights are split along their last dimension but one, biases along the last.
        columns, entries = ("packed_colwise", "packed_rowwise") if self.has_gate else ("colwise", "rowwise")
        by_width = {self.input_name: columns, "down_proj": "rowwise", "": "moe_tp_experts"}
        if self.has_bias:
            by_width[f"{self.input_name}_bias"] = entries
        by_expert = {name: "grouped_gemm" for name, _ in self.named_parameters()} | {"": "ep_dispatch_experts"}
        return {"tp_plan": by_width, "ep_plan": by_expert}

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # (M, f) each
        return self.act_fn(gate) * up if self.unit is None else self.unit(self.act_fn, gate, up)

    def forward(
        self,
        hidden_states: torch.Tensor,
        decision: Decision | torch.Tensor,
        expert_weight: torch.Tensor | None = None,
        slots: SortedSlots | None = None,
    ) -> torch.Tensor:
        """Run the experts on the tokens (T, d).

        Args:
            decision: the router's decision, or the index (T, K) of an assignment, as Transformers' experts take it.
            expert_weight (`torch.Tensor` of shape `(T, K)`, *optional*): the weights that belong to an index.
            slots (`SortedSlots`, *optional*): the slots of these experts among those of the decision.
        """
        if isinstance(decision, SlotMixture | ParameterMixture) and self._width_share() < 1.0:
            raise refuse_mixture(decision)
        if isinstance(decision, SlotMixture):
            return self.mix_slots(hidden_states, decision)
        if isinstance(decision, ParameterMixture):
            return self.merge_experts(hidden_states, decision)
        index = decision
        if isinstance(decision, ExpertAssignment):
            index, expert_weight = decision.expert_index, decision.expert_weight
        weight = expert_weight.to(hidden_states.dtype)
        if slots is not None:
            return run_sorted(self, hidden_states, slots, weight)
        backend = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, FfnExperts.eager)
        output = backend(self, hidden_states, index, weight)
        return output - self._surplus_bias(index, weight) if self.has_bias and self._width_share() < 1.0 else output

    def _width_share(self) -> float:
        """Return the share of the experts' width that this process holds: below 1 under tensor parallelism."""
        return self.down_proj.shape[-1] / self.intermediate_dim

    def _surplus_bias(self, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return what the other processes add of the last bias, (T, d): each holds it whole, and outputs are summed.

        Detached, so that each process has the whole gradient of its bias.
        """
        per_expert = weight.new_zeros(len(index), self.num_experts + 1).scatter_add(1, index, weight)  # (T, E + 1)
        bias = self.down_proj_bias.detach().to(weight.dtype)
        return (1.0 - self._width_share()) * (per_expert[:, :-1] @ bias)

    def eager(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Loop over the experts: the reference that every backend is tested against."""
        output = torch.zeros_like(hidden_states)
        stacks = zip(*(stack.unbind(0) for stack in self._stacks()), strict=True)
        for expert_idx, matrices in enumerate(stacks):
            token, slot = torch.where(top_k_index == expert_idx)
            expert_output = self._expert(hidden_states[token], *matrices)
            weighted = expert_output * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output

    def _stacks(self) -> list[torch.Tensor]:
        stacks = [getattr(self, self.input_name), self.down_proj]
        return stacks + [getattr(self, f"{self.input_name}_bias"), self.down_proj_bias] if self.has_bias else stacks

    def _expert(self, rows, input_weight, down_weight, input_bias=None, down_bias=None) -> torch.Tensor:
        inner = F.linear(rows, input_weight, input_bias)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return F.linear(inner, down_weight, down_bias)

    def mix_slots(self, hidden_states: torch.Tensor, decision: SlotMixture) -> torch.Tensor:
        """Run expert e on its mixed slots: inputs `dispatch^T x`, outputs `combine y`, both within one sequence."""
        dtype = compute_dtype(hidden_states)
        batch, positions, slots = decision.dispatch.shape
        tokens = hidden_states.reshape(batch, positions, -1).to(dtype)  # (B, S, d)
        inputs = torch.einsum("bsn,bsd->nbd", decision.dispatch.to(dtype), tokens)  # (N, B, d)
        inputs = inputs.reshape(self.num_experts, -1, self.hidden_dim)  # (E, slots * B, d)
        input_weight, down_weight, *biases = (stack.to(dtype) for stack in self._stacks())
        inner = torch.bmm(inputs, input_weight.transpose(1, 2))  # (E, slots * B, 2f or f)
        inner = inner + biases[0][:, None] if biases else inner
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outputs = torch.bmm(inner, down_weight.transpose(1, 2))  # (E, slots * B, d)
        outputs = (outputs + biases[1][:, None] if biases else outputs).view(slots, batch, -1)
        mixed = torch.einsum("bsn,nbd->bsd", decision.combine.to(dtype), outputs)
        return mixed.reshape(-1, self.hidden_dim).to(hidden_states.dtype)

    def merge_experts(self, hidden_states: torch.Tensor, decision: ParameterMixture) -> torch.Tensor:
        """Merge the experts by `expert_weight` into one per group and run every token through its group's."""
        dtype = compute_dtype(hidden_states)
        stacks = [stack.to(dtype) for stack in self._stacks()]
        output = torch.zeros_like(hidden_states, dtype=dtype)
        # One merged expert at a time: all of them at once would take G experts of memory.
        for group, weight in enumerate(decision.expert_weight.to(dtype)):
            matrices = [torch.einsum("e,e...->...", weight, stack) for stack in stacks]
            token = torch.where(decision.group_index == group)[0]
            output = output.index_add(0, token, self._expert(hidden_states[token].to(dtype), *matrices))
        return output.to(hidden_states.dtype)
