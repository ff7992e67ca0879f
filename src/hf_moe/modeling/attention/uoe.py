"""Heads as experts: every head of a trained attention is one, and a token uses the heads that its router picks.

    out_t = sum_{e in S_t} H P_{t,e} Attn_e(x)_t W_o^e        P = softmax(W x), S_t the K heads of the largest P

Head e keeps the columns of W_q and the rows of W_o that it has in the host's attention, so with all heads and a
uniform router the sum is that attention, whose last bias counts once. The router of the `moe_config` gives P, as `uoe`
and `top_k` without `norm_topk_prob` do. Queries and outputs are computed for the heads of a token alone.

Keys and values are those of all tokens, as in the host, so positions and cache stay its own: a token attends to tokens
that have not picked the head as well. In the paper's encoders a head sees only the tokens that it has selected.

Source: Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer, arXiv:2503.02495.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block import Parts, unwrapped
from ..dispatch import Dispatch, compute_dtype
from ..gating import check_slots
from ..host_attention import decide, decided, find_attention
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_attention
from ..replacement import Replacement
from ..routing import Router


@register_attention("uoe")
class HeadUnion:
    """Routed heads of the host's attention.

    Args:
        spec, parts, layer: see `replacement.py`; the router is that of the `moe_config`.
        num_heads_per_tok (`int`, *optional*, defaults to half of the heads): K.

    Raises:
        ValueError: if the layer's attention has no plain heads, or fewer than K.
    """

    def __init__(
        self, spec: MoELayerSpec, parts: Parts, layer: nn.Module, *, num_heads_per_tok: PositiveInt | None = None
    ):
        attention = find_attention(layer, "uoe")
        heads = attention.o_proj.in_features // attention.head_dim
        if attention.q_proj.out_features != attention.o_proj.in_features:
            raise ValueError(
                f"The attention of {type(layer).__name__} computes more than queries in q_proj, which is cut into "
                "heads: choose another host, such as Llama."
            )
        spec = replace(spec, num_experts=heads, num_experts_per_tok=num_heads_per_tok or max(1, heads // 2))
        check_slots(spec, heads, "uoe")
        attention.q_proj = HeadQueries(attention.q_proj, parts.router(spec), spec)
        attention.o_proj = HeadOutputs(attention.o_proj, spec)


class Heads(Replacement):
    """Base of the projections of single heads: a weight (H, out, in), and the bias that the host's has.

    Args:
        module: the host's projection.
        weight, bias: the shapes.
    """

    holds_experts = True
    changes_layer = True

    def __init__(self, module: nn.Linear, spec: MoELayerSpec, weight: tuple[int, ...], bias: tuple[int, ...]):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = None if module.bias is None else nn.Parameter(torch.empty(bias))

    def active_share(self, name: str, modality: int, experts: Callable[[Site], float]) -> float:
        return experts(self.spec.site) / self.spec.num_experts if name == "weight" else 1.0

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def place(self, dispatch: Dispatch) -> torch.Tensor:
        """Return where the head of every row is among those of all tokens, (M,)."""
        return dispatch.token * self.spec.num_experts + dispatch.expert


class HeadQueries(Heads):
    """Routes the tokens (B, S, d), and returns the queries of their heads, (B, S, H * d_h); zeros for the others."""

    def __init__(self, module: nn.Linear, gate: Router, spec: MoELayerSpec):
        shape = (spec.num_experts, module.out_features // spec.num_experts)
        super().__init__(module, spec, (*shape, module.in_features), shape)
        self.gate = gate

    @property
    def routers(self) -> list[Router]:
        return [unwrapped(self.gate)]

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        self.weight.copy_(module.weight.view_as(self.weight))
        if self.bias is not None:
            self.bias.copy_(module.bias.view_as(self.bias))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        decision = decide(self.gate, hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
        dispatch = Dispatch(decision.expert_index, self.spec.num_experts)
        rows = dispatch.linear(dispatch.rows(tokens.to(compute_dtype(tokens))), self.weight, self.bias)  # (M, d_h)
        heads = rows.new_zeros(len(tokens) * self.spec.num_experts, rows.shape[-1])  # (T * H, d_h)
        return heads.index_copy(0, self.place(dispatch), rows).view(*hidden_states.shape[:-1], -1)


class HeadOutputs(Heads):
    """Maps what the heads have seen, (B, S, H * d_h), to the weighted sum of those of a token, (B, S, d)."""

    def __init__(self, module: nn.Linear, spec: MoELayerSpec):
        width = module.in_features // spec.num_experts
        super().__init__(module, spec, (spec.num_experts, module.out_features, width), (module.out_features,))

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        self.weight.copy_(module.weight.unflatten(1, (len(self.weight), -1)).transpose(0, 1))
        if self.bias is not None:
            self.bias.copy_(module.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        decision, heads = decided(self.spec.site, states), self.spec.num_experts
        dispatch = Dispatch(decision.expert_index, heads)
        seen = states.reshape(-1, self.weight.shape[-1])  # (T * H, d_h)
        rows = dispatch.linear(seen.index_select(0, self.place(dispatch)), self.weight)  # (M, d)
        output = dispatch.combine(rows, decision.expert_weight * heads)  # (T, d)
        output = output if self.bias is None else output + self.bias.to(output.dtype)
        return output.view(*states.shape[:-1], -1)
