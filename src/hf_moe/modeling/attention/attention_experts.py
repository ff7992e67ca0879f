"""Attention experts: whole attentions side by side, whose outputs a router weighs for every token.

    out_t = sum_i w_i(x_t) Attn_i(x)_t        Attn_i: attention with W_q^i, W_k^i, W_v^i and W_o^i

Every expert attends at every token, since later tokens read its keys and values, and the weights w of a token sum to
1: experts that are all alike compute what one of them does. N experts cost N attentions and N caches. With `share_kv`
they differ in W_q and W_o, and read the keys and values of one: the cache is that of one attention.

- BAM: the experts are the attentions of models that were trained apart, w = softmax(W x).
- MoA for images: two experts, of which the first is the prior and stays as it is, w = softmax(MLP(x)).

The host's own attention runs, with N times its heads, so positions, masks and cache stay its own: expert i has the
i-th run of H query heads and of H_kv key heads. Where keys are shared, each key head serves the N * H / H_kv query
heads of all experts that had it. Norms of single queries and keys are one for all experts, as other norms are.

Sources: BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv:2408.08274; MoA:
Mixture-of-Attention for Subject-Context Disentanglement in Personalized Image Generation, arXiv:2404.11565.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from ...configuration.checks import PositiveInt
from ..block import Parts, unwrapped
from ..host_attention import PROJECTIONS, decide, decided, find_attention
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_attention
from ..replacement import Replacement
from ..routing import Router


@register_attention("attention_experts")
class AttentionExperts:
    """N attentions in the place of one.

    Args:
        spec, parts, layer: see `replacement.py`; the router is that of the `moe_config`.
        num_experts (`int`, *optional*, defaults to 2): N.
        num_experts_per_tok (`int`, *optional*, defaults to all): how many of them have a weight for a token. All are
            computed.
        share_kv (`bool`, *optional*, defaults to `False`): whether all read the same keys and values.

    Raises:
        ValueError: if the layer's attention has weights besides its projections that are not of one head.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        layer: nn.Module,
        *,
        num_experts: PositiveInt = 2,
        num_experts_per_tok: PositiveInt | None = None,
        share_kv: bool = False,
    ):
        attention = find_attention(layer, "attention_experts")
        others = {name for name, _ in attention.named_parameters() if not name.startswith(PROJECTIONS)}
        if of_heads := {name for name in others if attention.get_parameter(name).shape != (attention.head_dim,)}:
            raise ValueError(
                f"The attention of {type(layer).__name__} holds {', '.join(sorted(of_heads))}, which are not of "
                f"head_dim={attention.head_dim} and would be of more heads than its own: choose another host, such as "
                "Llama."
            )
        spec = replace(spec, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok or num_experts)
        key_heads = attention.k_proj.out_features // attention.head_dim
        runs = key_heads if share_kv else 1
        attention.q_proj = ExpertQueries(attention.q_proj, num_experts, runs, parts.router(spec))
        attention.o_proj = ExpertOutputs(attention.o_proj, num_experts, runs, spec.site)
        if share_kv:
            attention.num_key_value_groups *= num_experts
        else:
            attention.k_proj, attention.v_proj = (
                ExpertProjections(module, num_experts, runs) for module in (attention.k_proj, attention.v_proj)
            )


class ExpertCopies(Replacement):
    """A copy of a module of the host's attention for every expert.

    Args:
        module: the host's.
        num_experts: N.
        runs: into how many runs the heads of an expert are cut. The first runs of all experts come first, in the
            order of the experts, then the second ones; with a single run, all heads of an expert lie together.
    """

    holds_experts = True

    def __init__(self, module: nn.Module, num_experts: int, runs: int):
        super().__init__()
        # Not `experts`, the name of those that a MoE layer dispatches to: all of these work on every token.
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(num_experts))
        self.runs = runs

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        for own in self.copies:
            own.load_state_dict(module.state_dict())

    def join(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the heads (B, S, C) of each expert as those of one attention, (B, S, N * C)."""
        return torch.stack([own.unflatten(-1, (self.runs, -1)) for own in states], -2).flatten(-3)

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Return the heads of one attention, (B, S, N * C), as those of each expert, (B, S, C)."""
        cut = states.unflatten(-1, (self.runs, len(self.copies), -1))
        return [own.flatten(-2) for own in cut.unbind(-2)]


class ExpertProjections(ExpertCopies):
    """Maps the tokens (B, S, d) to the keys or values of all experts, (B, S, N * C)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.join([own(hidden_states) for own in self.copies])


class ExpertQueries(ExpertProjections):
    """Routes the tokens, and maps them to the queries of all experts."""

    def __init__(self, module: nn.Module, num_experts: int, runs: int, gate: Router):
        super().__init__(module, num_experts, runs)
        self.gate = gate

    @property
    def routers(self) -> list[Router]:
        return [unwrapped(self.gate)]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        decide(self.gate, hidden_states)
        return super().forward(hidden_states)


class ExpertOutputs(ExpertCopies):
    """Maps what the heads of all experts have seen, (B, S, N * C), to their weighted sum, (B, S, d)."""

    def __init__(self, module: nn.Module, num_experts: int, runs: int, site: Site):
        super().__init__(module, num_experts, runs)
        self.site = site

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = decided(self.site, states).weight_table().view(*states.shape[:-1], -1)  # (B, S, N)
        outputs = (own(part) for own, part in zip(self.copies, self.split(states), strict=True))
        weighed = [weight[..., [i]].to(output.dtype) * output for i, output in enumerate(outputs)]
        return torch.stack(weighed).sum(0)
