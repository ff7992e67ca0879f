"""Attentive experts: multi-head attention as a mixture of experts that leave heads out.

    out_t = sum_j s_j(t) head_j(t) W_o^j        s_j = h / (h - m) sum of g_i(t) over the experts i that keep head j

Each of the E = h! / (m! (h - m)!) experts leaves out another m of the h heads, and g is a gate over them; for m = 1,
s_j = h / (h - 1) (1 - g_j). A uniform gate gives s = 1, which is plain attention, and s always averages to 1. All that
is added to the host's attention is the gate, and one product per head and token.

Learnt together, a gate soon finds a favourite and trains it alone. Two kinds of steps take turns instead, see
`training/alternating_gates.py`. In a G step the gate alone learns, of the whole mixture. In an F step everything else
learns, and each row runs one expert in each layer, drawn from its gate: while training, a gate whose parameters need
no gradient is drawn from. The draw of a row is from the gate at its last token, which has read the row.

At inference a token runs the mixture, or the expert that is most likely for it.

Source: A Mixture of h - 1 Heads is Better than h Heads, arXiv:2005.06537.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ...configuration.checks import PositiveInt
from ..block import Parts, unwrapped
from ..decisions import ExpertAssignment
from ..gating import gate_logits, gumbel_noise
from ..host_attention import decide, decided, find_attention
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_attention
from ..replacement import Replacement
from ..routing import Router
from ..routing_context import active_context


# A gate of more experts has more rows than its layer has inner neurons.
MOST_EXPERTS = 4096


@register_attention("mae_attentive_experts")
class AttentiveExperts:
    """A scale for every head and token.

    Args:
        spec, parts, layer: see `replacement.py`; the router is that of the `moe_config`.
        dropped_heads (`int`, *optional*, defaults to 1): m.
        inference (`str`, *optional*, defaults to `"mixture"`): what a token runs at inference, or `"argmax"`.

    Raises:
        ValueError: if no head is left, or there are more than 4,096 experts.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        layer: nn.Module,
        *,
        dropped_heads: PositiveInt = 1,
        inference: Literal["mixture", "argmax"] = "mixture",
    ):
        attention = find_attention(layer, "mae_attentive_experts")
        heads = attention.k_proj.out_features // attention.head_dim * attention.num_key_value_groups
        experts = math.comb(heads, dropped_heads)
        if dropped_heads >= heads or experts > MOST_EXPERTS:
            raise ValueError(
                f"dropped_heads={dropped_heads} of {heads} heads makes {experts} experts of {heads - dropped_heads} "
                f"heads in layer {spec.layer_idx}: at least one head must stay, and {MOST_EXPERTS} experts are "
                "allowed. Leave out fewer."
            )
        spec = replace(spec, num_experts=experts, num_experts_per_tok=experts)
        attention.q_proj = GatedQueries(attention.q_proj, parts.router(spec), inference == "argmax")
        attention.o_proj = ScaledHeads(attention.o_proj, spec.site, heads, dropped_heads)


class HostProjection(Replacement):
    """A projection of the host, and something before it."""

    holds_experts = True
    changes_layer = True

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        self.projection.load_state_dict(module.state_dict())


class GatedQueries(HostProjection):
    """Maps tokens (B, S, d) to queries, and decides on what they attend with."""

    def __init__(self, projection: nn.Module, gate: Router, most_likely: bool):
        super().__init__(projection)
        self.gate = gate
        self.most_likely = most_likely

    @property
    def routers(self) -> list[Router]:
        return [unwrapped(self.gate)]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        decision = decide(self.gate, hidden_states)
        if self.training and not any(parameter.requires_grad for parameter in self.gate.parameters()):
            use_alone(decision, self._drawn(decision.weight_table(), hidden_states))
        elif self.most_likely and not self.training:
            use_alone(decision, decision.weight_table().argmax(-1))
        return self.projection(hidden_states)

    def _drawn(self, gates: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return an expert of every token, (T,), one for each row, drawn from the gates (T, E) at its last token."""
        mask = active_context(hidden_states).token_mask.to(gates.device)  # (B, S)
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)  # (B,)
        rows = gates.view(*mask.shape, -1)[torch.arange(len(mask), device=mask.device), last]  # (B, E)
        drawn = (rows.log() + gumbel_noise(rows)).argmax(-1)  # (B,)
        return drawn.repeat_interleave(mask.shape[1])


class ScaledHeads(HostProjection):
    """Scales what the heads have seen, (B, S, h * d_h), before it is mapped to the output."""

    def __init__(self, projection: nn.Module, site: Site, num_heads: int, dropped_heads: int):
        super().__init__(projection)
        self.site = site
        self.num_heads = num_heads
        self.dropped_heads = dropped_heads

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gates = decided(self.site, states).weight_table()  # (T, E)
        heads = states.view(*states.shape[:-1], self.num_heads, -1)
        scale = self.scales(gates).view(*heads.shape[:-1], 1)
        return self.projection((heads * scale.to(heads.dtype)).flatten(-2))

    def scales(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the scale of every head, (T, h), where the experts have the weights `gates` (T, E)."""
        left_out = torch.combinations(torch.arange(self.num_heads, device=gates.device), self.dropped_heads)  # (E, m)
        table = F.one_hot(left_out, self.num_heads).sum(1)  # (E, h)
        lost = gate_logits(gates, table.T)  # (T, h)
        return self.num_heads / (self.num_heads - self.dropped_heads) * (1.0 - lost)


def use_alone(decision: ExpertAssignment, expert: torch.Tensor) -> None:
    """Give all the weight of every token to one expert, `expert` (T,)."""
    decision.expert_weight = (decision.expert_index == expert[:, None]).to(decision.expert_weight.dtype)
