"""Modules that exist once for each of several modalities, of which a token uses that of its own."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .gating import gates_of
from .layer_spec import Site
from .replacement import Replacement
from .routing_context import RoutingContext, active_context


class TokenOrder(NamedTuple):
    """The tokens of a forward pass, grouped by the copy that they use.

    Attributes:
        order (`torch.Tensor` of shape `(T,)`): the tokens, those of the first copy first.
        place (`torch.Tensor` of shape `(T,)`): where each token is in that order.
        sizes: how many tokens use each copy.
    """

    order: torch.Tensor
    place: torch.Tensor
    sizes: list[int]

    @classmethod
    def of(cls, copy_index: torch.Tensor, copies: int) -> "TokenOrder":
        """Group tokens by their copies `copy_index` (T,)."""
        order = copy_index.argsort(stable=True)
        return cls(order, order.argsort(), copy_index.bincount(minlength=copies).tolist())


class PerModality(Replacement):
    """Copies of a module that maps tokens one by one, such as a projection or a norm.

    A copy that no token uses runs on none, so that it has a gradient of zeros.

    Args:
        module (`nn.Module`): the host's, `(..., in) -> (..., out)`.
        modalities (`list[str]`): those with a copy of their own, see [`gates_of`] for the others.
    """

    def __init__(self, module: nn.Module, modalities: list[str] | tuple[str, ...]):
        super().__init__()
        self.copy_of_modality = gates_of(modalities)
        for name in modalities:
            self.add_module(name, copy.deepcopy(module))

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        for own in self.children():
            own.load_state_dict(module.state_dict())

    def active_share(self, name: str, modality: int, experts: Callable[[Site], float]) -> float:
        return float([item for item, _ in self.named_children()].index(name) == self.copy_of_modality[modality])

    # How many tokens there are of a modality is data.
    @torch.compiler.disable
    def forward(self, hidden_states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Run every token's own copy.

        Args:
            others: what else the module takes of each token, as a gated norm takes a gate.

        Raises:
            ValueError: if the module maps other tokens than the sequence's.
        """
        # Gemma 3 norms queries and keys with heads before positions, (B, heads, S, in): a view of the other order.
        if hidden_states.dim() == 4 and hidden_states.stride(1) < hidden_states.stride(2):
            return self.forward(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = active_context(hidden_states)
        copies = list(self.children())
        order, place, sizes = self._order(context, hidden_states.device, len(copies))
        if hidden_states.shape[:-1].numel() % len(order):
            raise ValueError(
                f"A layer maps {tuple(hidden_states.shape)}, which are not the {len(order)} tokens whose modality is "
                "known, as in cross-attention: choose a host without it."
            )
        if max(sizes) == len(order) and not torch.is_grad_enabled():  # as in decoding; in training all need gradients
            return copies[sizes.index(len(order))](hidden_states, *others)
        groups = []
        for given in (hidden_states, *others):
            # Norms of queries and keys see every head by itself: (T, heads, in).
            rows = given.reshape(len(order), -1, given.shape[-1])
            groups.append(rows.index_select(0, order).split(sizes))
        output = torch.cat([own(*group) for own, *group in zip(copies, *groups, strict=True)])
        return output.index_select(0, place).view(*hidden_states.shape[:-1], -1)

    def _order(self, context: RoutingContext, device: torch.device, copies: int) -> TokenOrder:
        """Group the tokens, once for all modules and layers that share the copies of a modality."""
        key = f"per_modality {self.copy_of_modality} {device}"
        if key not in context.carry:
            table = torch.tensor(self.copy_of_modality, device=device)
            context.carry[key] = TokenOrder.of(table[context.tokens("modality_ids", device)], copies)
        return context.carry[key]
