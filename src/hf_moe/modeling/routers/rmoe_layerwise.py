"""Layerwise recurrent routing: the router of a layer remembers what the routers before it saw in the same token.

    x_l = W_l h_l        s_l = cell(x_l, s_{l-1})        logits = V_l s_l        s_0 = 0

    GRU:  r = sigmoid(A_r x + a_r + B_r s + b_r)        z = sigmoid(A_z x + a_z + B_z s + b_z)
          n = tanh(A_n x + a_n + r * (B_n s + b_n))     cell(x, s) = (1 - z) * n + z * s
    RNN:  cell(x, s) = tanh(A x + a + B s + b)

One cell of width p serves all layers; W_l (p, d) and V_l (E, p) are the layer's own. The weights of the K experts with
the largest softmax probabilities are divided by their sum. Training and inference are the same: the state runs along
the depth of a token and never along the sequence, so that decoding needs no further cache. A token takes
`d p + 6 p^2 + p E` multiply-adds, a plain gate d E.

Source: Layerwise Recurrent Router for Mixture-of-Experts, arXiv:2408.06793.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_router
from ..routing import Router, SharedPart
from ..routing_context import RoutingContext


class RecurrentCell(SharedPart):
    """The cell of all layers: `forward(inputs (T, p), state (T, p)) -> (T, p)`, in float32.

    Torch's own cells refuse inputs of another type than their weights.

    Args:
        width (`int`): p.
        cell (`str`): `"gru"` or `"rnn"`.
        sites (`list`): of the routers, in the order in which they run.
    """

    def __init__(self, width: int, cell: str, sites: list[Site]):
        super().__init__()
        rows = (3 if cell == "gru" else 1) * width  # those of r, z and n
        self.cell = cell
        self.sites = sites
        self.input_weight = nn.Parameter(torch.empty(rows, width))
        self.input_bias = nn.Parameter(torch.empty(rows))
        self.state_weight = nn.Parameter(torch.empty(rows, width))
        self.state_bias = nn.Parameter(torch.empty(rows))

    def initialize(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def site_before(self, site: Site, states: dict[Site, torch.Tensor]) -> Site | None:
        """Return the last of the sites before one that has left a state."""
        earlier = self.sites[: self.sites.index(site)]
        return next((other for other in reversed(earlier) if other in states), None)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        new = gate_logits(inputs, self.input_weight, self.input_bias)
        old = gate_logits(state, self.state_weight, self.state_bias)
        if self.cell == "rnn":
            return (new + old).tanh()
        reset, keep = (new + old)[:, : 2 * state.shape[-1]].sigmoid().chunk(2, dim=-1)  # (T, p) both
        candidate = (new.chunk(3, dim=-1)[2] + reset * old.chunk(3, dim=-1)[2]).tanh()
        return (1 - keep) * candidate + keep * state


@register_router("rmoe_layerwise")
class RMoELayerwiseRouter(Router):
    """Softmax top-k on a state that runs from layer to layer.

    Args:
        router_state_dim (`int`, *optional*, defaults to 256): p.
        router_cell (`str`, *optional*, defaults to `"gru"`): `"gru"`, or `"rnn"`, a plain tanh cell.
        detach_router_state (`bool`, *optional*, defaults to `False`): cut the gradient between layers (an ablation).

    Raises:
        ValueError: if K does not lie in [1, E]; when the model is built, if its layers differ in the cell.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        router_state_dim: PositiveInt = 256,
        router_cell: Literal["gru", "rnn"] = "gru",
        detach_router_state: bool = False,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "rmoe_layerwise")
        self.router_cell = router_cell
        self.detach_router_state = detach_router_state
        self.projection = nn.Parameter(torch.empty(router_state_dim, spec.hidden_size))  # W
        self.scorer = nn.Parameter(torch.empty(spec.num_experts, router_state_dim))  # V

    @classmethod
    def shared_part(cls, routers: Sequence[Any]) -> RecurrentCell:
        cells = {(len(router.projection), router.router_cell) for router in routers}
        if len(cells) > 1:
            raise ValueError(
                "The router 'rmoe_layerwise' has one cell for all MoE layers, which therefore need one "
                f"router_state_dim and one router_cell; got {sorted(cells)}."
            )
        return RecurrentCell(*cells.pop(), [router.spec.site for router in routers])

    def initialize(self, std: float) -> None:
        init.normal_(self.projection, mean=0.0, std=std)
        init.normal_(self.scorer, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        cell = self.shared(context)
        inputs = gate_logits(hidden_states, self.projection)  # (T, p)
        # By site, so that a layer which is recomputed in the backward pass reads what it read the first time.
        states = context.carry.setdefault("router_states", {})
        before = cell.site_before(self.spec.site, states)
        state = torch.zeros_like(inputs) if before is None else states[before].to(inputs.device)
        states[self.spec.site] = cell(inputs, state.detach() if self.detach_router_state else state)
        return assign(gate_logits(states[self.spec.site], self.scorer), self.spec, context, masked=False)
