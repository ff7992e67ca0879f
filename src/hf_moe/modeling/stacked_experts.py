"""Experts stored as Transformers stores those of its own MoE models, on which all of its tools work.

    gated:  y = W_down (act(W_gate x) * (W_up x))        plain:  y = W_down act(W_up x)

Weights are stacked: `gate_up_proj` (E, 2f, d) with the gate first, or `up_proj` (E, f, d), and `down_proj` (E, d, f),
each with `_bias` where the host's feed-forward has biases. So PEFT's `target_parameters`, expert-parallel plans,
quantisers and weight loaders apply unchanged.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .decisions import Decision, ExpertAssignment, ParameterMixture, SlotMixture, refuse_mixture
from .dispatch import RAGGED, Dispatch, compute_dtype, ragged_experts_forward, run_rows, run_stacks
from .layer_spec import MoELayerSpec
from .routing import Experts


class StackedExperts(Experts):
    """Base of the kinds whose experts are feed-forwards of one width.

    A kind that stores a weight in another form overrides [`~StackedExperts.add_stack`] and gives the weight as a
    property: every backend reads it from there.

    Args:
        config: the outer `HfMoeConfig`; its `_experts_implementation` picks the backend at every call.
        spec (`MoELayerSpec`): facts of the layer.
    """

    takes_index_and_weight = True

    def __init__(self, config, spec: MoELayerSpec):
        super().__init__()
        self.config = config
        self.num_experts = spec.num_experts
        self.hidden_dim = spec.hidden_size
        self.output_dim = spec.output_size or spec.hidden_size
        self.intermediate_dim = spec.expert_intermediate_size
        # Instance flags that Transformers' backends read; their decorator would overwrite them per class.
        self.has_gate = spec.gated
        self.has_bias = spec.bias
        self.has_post_expert_norm = False
        self.is_transposed = False
        self.is_concatenated = True
        # It makes the stock backends skip the index E of an empty slot instead of crashing or returning NaN.
        self._is_expert_parallel = True
        self.act_fn = ACT2FN[spec.hidden_act]
        self.input_name = "gate_up_proj" if self.has_gate else "up_proj"
        inner = 2 * self.intermediate_dim if self.has_gate else self.intermediate_dim
        self.add_stack(self.input_name, inner, self.hidden_dim)
        self.add_stack("down_proj", self.output_dim, self.intermediate_dim)
        if self.has_bias:
            self.add_stack(f"{self.input_name}_bias", inner)
            self.add_stack("down_proj_bias", self.output_dim)

    def add_stack(self, name: str, *shape: int) -> None:
        """Give the experts the parameter `name`, (E, *shape)."""
        self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *shape)))

    def initialize(self, std: float) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    @property
    def widths(self) -> list[int]:
        return [self.intermediate_dim] * self.num_experts

    @torch.no_grad()
    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        for expert, state in enumerate(states):
            for name, tensor in state.items():
                copy_whole(getattr(self, name)[expert], tensor, name)
        return True

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        names = [name for name, _ in self.named_parameters(recurse=False)]
        for expert in range(self.num_experts):
            yield {name: getattr(self, name)[expert] for name in names}

    @property
    def takes_dispatch(self) -> bool:
        # A forward that a parallel plan has put in its place takes index and weight alone.
        return self.backend == RAGGED and "forward" not in vars(self)

    @property
    def backend(self) -> str | None:
        """The name of the function that runs the experts: Transformers' own return the width that they are given."""
        return self.config._experts_implementation if self.output_dim == self.hidden_dim else RAGGED

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
        return self.act_fn(gate) * up

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return run_stacks(self, tokens, dispatch)

    def forward(
        self,
        hidden_states: torch.Tensor,
        decision: Decision | torch.Tensor,
        expert_weight: torch.Tensor | None = None,
        *,
        dispatch: Dispatch | None = None,
    ) -> torch.Tensor:
        """Run the experts on the tokens (T, d).

        Args:
            decision: the router's decision, or the index (T, K) of an assignment, as Transformers' experts take it.
            expert_weight (`torch.Tensor` of shape `(T, K)`, *optional*): the weights that belong to an index.
            dispatch (`Dispatch`, *optional*): the slots of these experts among those of the decision.
        """
        if isinstance(decision, SlotMixture | ParameterMixture) and self._width_share() < 1.0:
            raise refuse_mixture(decision)
        if isinstance(decision, SlotMixture):
            return super().forward(hidden_states, decision)
        if isinstance(decision, ParameterMixture):
            return self.merge_experts(hidden_states, decision)
        index = decision
        if isinstance(decision, ExpertAssignment):
            index, expert_weight = decision.expert_index, decision.expert_weight
        weight = expert_weight.to(hidden_states.dtype)
        if dispatch is not None:
            return run_rows(self.compute, hidden_states, dispatch, weight)
        backend = ALL_EXPERTS_FUNCTIONS.get_interface(self.backend, type(self).eager)
        if self.backend == RAGGED:
            # The code of another checkpoint in the process may have registered its own under this name.
            backend = ragged_experts_forward
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

    def merge_experts(self, hidden_states: torch.Tensor, decision: ParameterMixture) -> torch.Tensor:
        """Merge the experts by `expert_weight` into one per group and run every token through its group's."""
        dtype = compute_dtype(hidden_states)
        stacks = [stack.to(dtype) for stack in self._stacks()]
        output = hidden_states.new_zeros(len(hidden_states), self.output_dim, dtype=dtype)
        # One merged expert at a time: all of them at once would take G experts of memory.
        for group, weight in enumerate(decision.expert_weight.to(dtype)):
            matrices = [torch.einsum("e,e...->...", weight, stack) for stack in stacks]
            token = torch.where(decision.group_index == group)[0]
            output = output.index_add(0, token, self._expert(hidden_states[token].to(dtype), *matrices))
        return output.to(hidden_states.dtype)

    def _stacks(self) -> list[torch.Tensor]:
        stacks = [getattr(self, self.input_name), self.down_proj]
        return stacks + [getattr(self, f"{self.input_name}_bias"), self.down_proj_bias] if self.has_bias else stacks

    def _expert(self, rows, input_weight, down_weight, input_bias=None, down_bias=None) -> torch.Tensor:
        inner = F.linear(rows, input_weight, input_bias)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return F.linear(inner, down_weight, down_bias)


def copy_whole(own: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    """Copy a weight of a feed-forward into that of an expert.

    Raises:
        ValueError: if they are of different shapes.
    """
    if own.shape != tensor.shape:
        raise ValueError(
            f"The {name} of an expert is {tuple(own.shape)}, and that of the feed-forward {tuple(tensor.shape)}: such "
            "experts cannot be copies of it. Build a fresh model, from the fields of a config."
        )
    own.copy_(tensor)
