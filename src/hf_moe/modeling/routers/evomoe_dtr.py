"""EvoMoE's dynamic token-aware router: a hypernetwork writes, for every token, the adapter that it is scored through.

For a token z of width C and the hypernetwork of its modality:

    theta = W2 (W1 z + b1) + b2,   split into Theta_down (r, C) and Theta_up (C, r)          no nonlinearity in between
    e     = Theta_up act(Theta_down z)                                                       (C,)
    rho   = softmax(Phi e)                                                                   (E,), Phi common to all
    S     = the K largest of rho,  weight = rho itself                                       K = 1 in the paper

The weight is the plain probability: renormalised, a lone slot would weigh 1 for ever and Phi learn nothing. theta is
never materialised: with A = W1 z + b1 (h,) both products are linear in the h * r values A_i (W2_i z). That is about
2 C h r multiply-adds per token, and h r = C by default: in small models the router can cost more than an expert, so
time it, and let `hyper_hidden` follow the expert's width.

Image and video tokens use the vision hypernetwork, all others that of text, unless `modalities` names more. W2's bias
b2 is a random adapter at the start, so that the router begins as an ordinary two-layer one with a small
token-dependent part.

The tokens are sorted by modality and every hypernetwork runs on its own, which breaks a compiled graph.
Source: EvoMoE: Expert Evolution in Mixture of Experts for Multimodal Large Language Models, arXiv:2505.23830 (its
inner sizes, initialisation and the treatment of the top-1 weight are not published and were chosen).
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..decisions import ExpertAssignment
from ..dispatch import Dispatch
from ..gating import assign, by_modality, check_slots, gate_logits, gates_of, per_gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("evomoe_dtr")
class EvoMoEDtrRouter(Router):
    """A hypernetwork H for each of `modalities`, and one scorer `weight` (E, C) for all.

    Args:
        spec: facts of the layer; the paper has K = 1.
        hyper_hidden: h; C / 8 when absent.
        bottleneck_rank: r.
        bottleneck_act: `"silu_gate_self"`: silu(a) a; `"split"`: SwiGLU on the halves of a bottleneck of 2 r.
        modalities: those with a hypernetwork of their own, text first. Video shares that of images unless it is named;
            any other modality without one shares that of text.
        per_modality: `False` gives all tokens one hypernetwork (an ablation of the paper).
        generator: `"hyper"`, or `"linear"`: plain linear gates, `weight` (G, E, C), one in the place of each
            hypernetwork (an ablation of the paper).
        shared_router: add the scores of a linear router common to all tokens, times a learnt scalar that starts at 1
            (an ablation of the paper; it hurt).

    Raises:
        ValueError: if K does not lie in [1, E], or `modalities` does not begin with text.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        hyper_hidden: PositiveInt | None = None,
        bottleneck_rank: PositiveInt = 8,
        bottleneck_act: Literal["silu_gate_self", "split"] = "silu_gate_self",
        modalities: list[str] | tuple[str, ...] = ("text", "image"),
        per_modality: bool = True,
        generator: Literal["hyper", "linear"] = "hyper",
        shared_router: bool = False,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "evomoe_dtr")
        self.gate_of_modality = gates_of(modalities if per_modality else ["text"])
        nets = max(self.gate_of_modality) + 1
        self.generator = generator
        self.shared_router = shared_router
        if shared_router:
            self.shared_weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
            self.shared_scale = nn.Parameter(torch.empty(1))
        if generator == "linear":
            self.weight = nn.Parameter(torch.empty(nets, spec.num_experts, spec.hidden_size))
            return
        self._build_networks(nets, hyper_hidden, bottleneck_rank, bottleneck_act)

    def _build_networks(self, nets: int, hyper_hidden: int | None, rank: int, bottleneck_act: str) -> None:
        width = self.spec.hidden_size
        inner = 2 * rank if bottleneck_act == "split" else rank
        hidden = max(1, width // 8) if hyper_hidden is None else hyper_hidden
        self.bottleneck_act = bottleneck_act
        self.token_weight = nn.Parameter(torch.empty(nets, hidden, width))  # W1
        self.token_bias = nn.Parameter(torch.empty(nets, hidden))  # b1
        self.down_weight = nn.Parameter(torch.empty(nets, hidden * inner, width))  # the rows of W2 for Theta_down
        self.down_bias = nn.Parameter(torch.empty(nets, inner, width))  # b2
        self.up_weight = nn.Parameter(torch.empty(nets, width, hidden * rank))
        self.up_bias = nn.Parameter(torch.empty(nets, width, rank))
        self.weight = nn.Parameter(torch.empty(self.spec.num_experts, width))  # Phi

    def _networks(self) -> tuple[nn.Parameter, ...]:
        """Return the stacked parameters of the hypernetworks, none for linear gates."""
        if self.generator == "linear":
            return ()
        biases = (self.token_bias, self.down_bias, self.up_bias)
        return self.token_weight, self.down_weight, self.up_weight, *biases

    def initialize(self, std: float) -> None:
        for weight in (*self._networks()[:3], self.weight):
            init.normal_(weight, mean=0.0, std=std)
        if self.generator == "hyper":
            init.zeros_(self.token_bias)
            init.normal_(self.down_bias, mean=0.0, std=self.down_bias.shape[-1] ** -0.5)
            init.normal_(self.up_bias, mean=0.0, std=self.up_bias.shape[-1] ** -0.5)
        if self.shared_router:
            init.normal_(self.shared_weight, mean=0.0, std=std)
            init.ones_(self.shared_scale)

    def gate_rows(self) -> torch.Tensor | None:
        # Phi scores adapted tokens, not hidden states.
        return super().gate_rows() if self.generator == "linear" else None

    @torch.no_grad()
    def start_from(self, old: Router) -> None:
        super().start_from(old)
        rows = old.gate_rows()
        if rows is not None and self.shared_router:
            self.shared_weight.copy_(rows[0])

    def idle_parameters(self) -> int:
        stacks = [self.weight] if self.generator == "linear" else self._networks()
        nets = max(self.gate_of_modality) + 1
        return sum(stack.numel() for stack in stacks) * (nets - 1) // nets

    @torch.compiler.disable
    def adapt(self, tokens: torch.Tensor, network: torch.Tensor) -> torch.Tensor:
        """Return e (T, C) of tokens (T, C) float32, through the hypernetwork that each names in `network` (T,)."""
        dispatch = Dispatch(network[:, None], len(self.token_weight))
        rows = dispatch.rows(tokens)  # (T, C)
        mixing = dispatch.linear(rows, self.token_weight, self.token_bias)  # (T, h), A
        down = dispatch.linear(rows, self.down_weight).unflatten(-1, (mixing.shape[-1], -1))  # (T, h, r)
        inner = (mixing[..., None] * down).sum(1) + dispatch.linear(rows, self.down_bias)  # (T, r)
        if self.bottleneck_act == "split":
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.silu(inner) * inner
        outer = (mixing[..., None] * inner[:, None]).flatten(1)  # (T, h * r)
        adapted = dispatch.linear(outer, self.up_weight) + dispatch.linear(inner, self.up_bias)
        return torch.empty_like(adapted).index_copy(0, dispatch.token, adapted)

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        network = by_modality(self.gate_of_modality, context, hidden_states.device)  # (T,)
        if self.generator == "linear":
            logits = per_gate_logits(hidden_states, self.weight, network)  # (T, E)
        else:
            with torch.autocast(hidden_states.device.type, enabled=False):
                adapted = self.adapt(hidden_states.float(), network)
            logits = gate_logits(adapted, self.weight)  # (T, E)
        if self.shared_router:
            logits = logits + self.shared_scale.float() * gate_logits(hidden_states, self.shared_weight)
        return assign(logits, self.spec, context, norm=False)
