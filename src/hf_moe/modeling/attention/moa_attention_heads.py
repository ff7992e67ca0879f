"""Mixture of attention heads: the heads that a router picks attend, over keys and values that all heads share.

    out_t = sum_{e in S_t} w_e Attn(h_t W_q^e, K, V) W_o^e        w_e = P_e / sum_{i in S_t} P_i, the sum detached

W_q^e is (d, d_h), W_o^e (d_h, d), and K = h W_k, V = h W_v are those of one head. The weights of a token sum to 1, and
the gradient still feels how large its P are. Cost grows with the K heads of a token, weights with the E heads to
choose from, and the cache holds one head.

The host's own attention runs, with `num_attention_heads` = K and `num_key_value_heads` = 1: its k-th query head is
that of a token's k-th slot, and only `q_proj` and `o_proj` are replaced.

Source: Mixture of Attention Heads: Selecting Attention Heads Per Token, arXiv:2210.05144.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block import Parts, unwrapped
from ..dispatch import Dispatch, compute_dtype
from ..host_attention import PROJECTIONS, decide, decided, find_attention
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_attention
from ..replacement import Replacement
from ..routing import Router


@register_attention("moa_attention_heads")
class AttentionHeads:
    """Routed query heads over one key and value head.

    Args:
        spec, parts, layer: see `replacement.py`; the router is that of the `moe_config`.
        num_experts (`int`, *optional*, defaults to 16): E, the heads to choose from.

    Raises:
        ValueError: if the layer has no attention of one key and value head, or projections with biases.
    """

    def __init__(self, spec: MoELayerSpec, parts: Parts, layer: nn.Module, *, num_experts: PositiveInt = 16):
        attention = find_attention(layer, "moa_attention_heads")
        head_dim = attention.k_proj.out_features
        if head_dim != attention.head_dim or any(getattr(attention, name).bias is not None for name in PROJECTIONS):
            raise ValueError(
                f"The attention of {type(layer).__name__} is none that moa_attention_heads could take: one of one key "
                "and value head, without biases. Set num_key_value_heads=1 in the decoder's config."
            )
        heads = attention.q_proj.out_features // head_dim
        spec = replace(spec, num_experts=num_experts, num_experts_per_tok=heads)
        attention.q_proj = HeadQueries(parts.router(spec), spec, head_dim)
        attention.o_proj = HeadOutputs(spec, head_dim)


class HeadQueries(Replacement):
    """Routes the tokens, and returns the queries of their heads, (B, S, K * d_h); zeros for an empty slot."""

    holds_experts = True

    def __init__(self, gate: Router, spec: MoELayerSpec, head_dim: int):
        super().__init__()
        self.gate = gate
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, head_dim, spec.hidden_size))

    @property
    def routers(self) -> list[Router]:
        return [unwrapped(self.gate)]

    def active_share(self, name: str, modality: int, experts: Callable[[Site], float]) -> float:
        return experts(self.spec.site) / self.spec.num_experts if name == "weight" else 1.0

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        decision = decide(self.gate, hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, d)
        dispatch = Dispatch(decision.expert_index, self.spec.num_experts)
        rows = dispatch.linear(dispatch.rows(tokens.to(compute_dtype(tokens))), self.weight)  # (M, d_h)
        slots = rows.new_zeros(decision.expert_index.numel(), rows.shape[-1])  # (T * K, d_h)
        return slots.index_copy(0, dispatch.order, rows).view(*hidden_states.shape[:-1], -1)


class HeadOutputs(Replacement):
    """Maps what the heads of a token have seen, (B, S, K * d_h), to their weighted sum, (B, S, d)."""

    holds_experts = True

    def __init__(self, spec: MoELayerSpec, head_dim: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size, head_dim))

    def active_share(self, name: str, modality: int, experts: Callable[[Site], float]) -> float:
        return experts(self.spec.site) / self.spec.num_experts if name == "weight" else 1.0

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        decision = decided(self.spec.site, states)
        dispatch = Dispatch(decision.expert_index, self.spec.num_experts)
        slots = states.reshape(*decision.expert_index.shape, -1)  # (T, K, d_h)
        rows = dispatch.linear(dispatch.slot_rows(slots), self.weight)  # (M, d)
        mass = decision.expert_weight.sum(-1, keepdim=True).detach()  # (T, 1)
        weight = decision.expert_weight / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        return dispatch.combine(rows, weight).view(*states.shape[:-1], -1)
