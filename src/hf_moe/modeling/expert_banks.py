"""Isolated banks of experts behind one numbering, and how a layer calls experts of any make."""

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import islice

import torch
from torch import nn

from .decisions import Decision, ExpertAssignment
from .dispatch import Dispatch
from .routing import Experts


class ExpertBanks(Experts):
    """Isolated banks of different width behind one numbering: bank 0 holds the first experts, and so on.

    Every bank sees the slots of its own experts and empty ones, so a bank that no token uses costs no matrix work and
    still receives a gradient of zeros.
    """

    def __init__(self, banks: dict[str, Experts], sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.num_experts = sum(sizes)
        self.names = list(banks)
        for name, bank in banks.items():
            self.add_module(name, bank)

    @property
    def banks(self) -> list[Experts]:
        return [getattr(self, name) for name in self.names]

    def parameters_per_run(self) -> list[float]:
        return [count for bank in self.banks for count in bank.parameters_per_run()]

    def parameters_per_token(self) -> int:
        return sum(bank.parameters_per_token() for bank in self.banks)

    @property
    def widths(self) -> list[int]:
        return [width for bank in self.banks for width in bank.widths]

    def take(self, states: Iterable[dict[str, torch.Tensor]], inputs: torch.Tensor | None = None) -> bool:
        states = iter(states)
        pairs = zip(self.banks, self.sizes, strict=True)
        return all([bank.take(islice(states, size), inputs) for bank, size in pairs])

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        for bank in self.banks:
            yield from bank.states()

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, decision: Decision
    ) -> torch.Tensor:
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(
                f"Isolated banks need a router that assigns experts; {type(decision).__name__} mixes experts of one "
                "width. Leave moe_config.expert_banks out."
            )
        banks = self.banks
        if all(isinstance(bank, Experts) and bank.takes_dispatch for bank in banks):
            # Sorted once for all banks; a wrapper of PEFT's takes the other way.
            parts = Dispatch(decision.expert_index, sum(self.sizes)).split(self.sizes)
            outputs = [bank(hidden_states, decision, dispatch=part) for bank, part in zip(banks, parts, strict=True)]
            return reduce(torch.add, outputs)
        outputs, start = [], 0
        for bank, size in zip(banks, self.sizes, strict=True):
            local = decision.expert_index - start  # (T, K)
            inside = (local >= 0) & (local < size)
            assignment = ExpertAssignment(
                expert_index=local.masked_fill(~inside, size),
                expert_weight=decision.expert_weight.masked_fill(~inside, 0.0),
                num_experts=size,
            )
            outputs.append(run_assignment(bank, hidden_states, assignment))
            start += size
        return reduce(torch.add, outputs)


def run_assignment(experts: nn.Module, hidden_states: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
    """Run `experts`, or what wraps or replaces them, on the slots of an assignment."""
    inner = experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
    if isinstance(inner, Experts) and not inner.takes_index_and_weight:
        return experts(hidden_states, assignment)
    index, weight = assignment.expert_index, assignment.expert_weight
    if getattr(inner, "num_experts", assignment.num_experts) == assignment.num_experts:
        return experts(hidden_states, index, weight)
    # Each process holds some of the experts. A row per filled slot: the exchange has no place for an empty one.
    token, slot = torch.where(index < assignment.num_experts)  # (M,) both
    output = experts(hidden_states[token], index[token, slot, None], weight[token, slot, None])
    return output.new_zeros(len(hidden_states), output.shape[-1]).index_add(0, token, output)


def slot_outputs(
    experts: nn.Module, hidden_states: torch.Tensor, expert_index: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Return what the expert of every slot (T, K) makes of its token, (T, K, out), not weighed; 0 at empty slots.

    The experts run once, on every slot as if it were a token with one expert, which any kind and backend serves.
    """
    index = expert_index.reshape(-1, 1)  # (T * K, 1)
    single = ExpertAssignment(index, (index < num_experts).to(hidden_states.dtype), num_experts)
    output = run_assignment(experts, hidden_states.repeat_interleave(expert_index.shape[1], dim=0), single)
    return output.unflatten(0, expert_index.shape)
