"""Experts whose stacked weights are computed from what they store, those of the experts that have tokens alone."""

from collections.abc import Iterator
from typing import TypeAlias

import torch

from .decisions import Decision, ExpertAssignment
from .dispatch import RAGGED, Dispatch, EvenDispatch, grouped_linear, run_stacks, stack_linear
from .routing import Experts
from .stacked_experts import StackedExperts


# Some of the experts, as an index of their stacks.
Chosen: TypeAlias = torch.Tensor | slice
EVERY = slice(None)


def _computed(name: str) -> property:
    """Return the property of a stack (E, out, in)."""
    return property(lambda self: self.weight(name))


class ComputedStacks(StackedExperts):
    """Base of the kinds that define `weight(name, experts)`; biases are stored as they are.

    The backend `"ragged"` asks for the weights of the experts in use, every other one for whole stacks.
    """

    gate_up_proj, up_proj, down_proj = (_computed(name) for name in ("gate_up_proj", "up_proj", "down_proj"))

    def weight(self, name: str, experts: Chosen = EVERY) -> torch.Tensor:
        """Return the weights of some experts, (experts, out, in)."""
        raise NotImplementedError(f"{type(self).__name__} must define weight(name, experts).")

    @property
    def stack_names(self) -> list[str]:
        """The names of the stacks of weights."""
        return [self.input_name, "down_proj"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        decision: Decision | torch.Tensor,
        expert_weight: torch.Tensor | None = None,
        *,
        dispatch: Dispatch | None = None,
    ) -> torch.Tensor:
        index = decision.expert_index if isinstance(decision, ExpertAssignment) else decision
        if dispatch is None and self.backend == RAGGED and isinstance(index, torch.Tensor):
            dispatch = Dispatch(index, self.num_experts)
        return super().forward(hidden_states, decision, expert_weight, dispatch=dispatch)

    def compute(self, tokens: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        every = isinstance(dispatch, EvenDispatch)
        return run_stacks(self, tokens, dispatch, stack_linear if every else _linear_of_used)

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        for expert in range(self.num_experts):
            state = {name: self.weight(name, slice(expert, expert + 1))[0] for name in self.stack_names}
            if self.has_bias:
                state |= {f"{name}_bias": getattr(self, f"{name}_bias")[expert] for name in self.stack_names}
            yield state

    def parameters_per_run(self) -> list[float]:
        # A token is multiplied with whole stacks, whatever they are computed from.
        inputs = 2 * self.hidden_dim if self.has_gate else self.hidden_dim
        count = self.intermediate_dim * (inputs + self.output_dim)
        count += sum(getattr(self, f"{name}_bias")[0].numel() for name in self.stack_names if self.has_bias)
        return [float(count)] * self.num_experts

    def parallel_plans(self) -> dict[str, dict[str, str]]:
        return Experts.parallel_plans(self)

    def _width_share(self) -> float:
        return 1.0  # no plan splits them


def _linear_of_used(experts: ComputedStacks, name: str, rows: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Apply a stack, whose weights are computed for the experts that have rows."""
    counts = torch.diff(dispatch.offsets, prepend=dispatch.offsets.new_zeros(1))
    used = torch.where(counts > 0)[0]
    bias = getattr(experts, f"{name}_bias")[used] if experts.has_bias else None
    return grouped_linear(rows, experts.weight(name, used), dispatch.offsets[used], bias)
