"""UniMoE-Audio: a token takes as many experts as its gate needs to be sure, null ones among them, and all shared ones.

    p = softmax over routed and null candidates of W x        e_1, e_2, ... in order of falling p
    A = {e_1, ..., e_k}        k = 1 + the number of e_j with p_{e_1} + ... + p_{e_j} < P
    q = softmax over A and the shared experts of W x
    w_e = q(A) p_e / p(A)  for e in A        w_s = q_s  for the shared experts s

q(A) and p(A) are sums over A. All weights add up to 1, and those of null experts, whose output is 0, are lost. So a
token whose first choice is a sure null expert runs the shared experts alone. A token never depends on another, in
training or at inference.

Shared experts are the last ones of the layer, weighed by the gate; in a bank of their own they have a width of their
own. `router_logits` are -inf for them, for nobody chooses them, and `router_probs` are p_e / p(A) in A, else 0, which
the objective `active_balance` balances, null experts too.

Source: UniMoE-Audio: Unified Speech and Music Generation with Dynamic-Capacity MoE, arXiv:2510.13344.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt, Share
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, from_mask, gate_logits, jitter, renormalise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("unimoe_audio")
class UniMoEAudioRouter(Router):
    """Top-p over routed and null experts, beside weighed shared ones.

    Args:
        spec (`MoELayerSpec`): facts of the layer; its experts are the routed and the shared ones. K does not matter.
        num_shared_experts (`int`, *optional*, defaults to 2): how many of them, the last ones, are shared. It is not
            `moe_config.num_shared_experts`, the branch that no gate weighs.
        num_null_experts (`int`, *optional*, defaults to 1): null candidates.
        top_p_threshold (`float`, *optional*, defaults to 0.7): P.
        dynamic_weights (`str`, *optional*, defaults to `"probability"`): `"probability"` as above, or `"uniform"`:
            1 / k in place of p_e / p(A), which the released code comes close to.
        jitter_noise (`float`, *optional*, defaults to 0.01): while training, multiply the gate's input by
            uniform(1 - jitter_noise, 1 + jitter_noise).

    Raises:
        ValueError: unless some of the experts are routed, and, where the layer has banks, there are two, the second
            one with the shared experts.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        num_shared_experts: PositiveInt = 2,
        num_null_experts: NonNegativeInt = 1,
        top_p_threshold: Share = 0.7,
        dynamic_weights: Literal["probability", "uniform"] = "probability",
        jitter_noise: Share = 0.01,
    ):
        super().__init__(spec)
        self.num_routed = spec.num_experts - num_shared_experts
        sizes = [size for _, size, _ in spec.banks]
        if self.num_routed < 1 or sizes not in ([], [self.num_routed, num_shared_experts]):
            raise ValueError(
                f"Router 'unimoe_audio' of layer {spec.layer_idx}: of num_experts={spec.num_experts} the last "
                f"num_shared_experts={num_shared_experts} are shared, and at least one must be routed; banks, if any, "
                f"hold these two kinds, got {sizes}."
            )
        self.top_p_threshold = top_p_threshold
        self.dynamic_weights = dynamic_weights
        self.jitter_noise = jitter_noise
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.null_weight = nn.Parameter(torch.empty(num_null_experts, spec.hidden_size)) if num_null_experts else None

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        if self.null_weight is not None:
            init.normal_(self.null_weight, mean=0.0, std=std)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        routed, experts = self.num_routed, self.spec.num_experts
        weight = self.weight if self.null_weight is None else torch.cat([self.weight, self.null_weight])
        logits = gate_logits(jitter(hidden_states, self.jitter_noise, self.training), weight)
        logits = apply_overrides(logits, self.spec, context)  # (T, E + M), the null candidates last
        shared = torch.zeros_like(logits[0], dtype=torch.bool)
        shared[routed:experts] = True
        dynamic = logits.masked_fill(shared, float("-inf"))
        probs = dynamic.softmax(-1)
        ordered, order = probs.detach().sort(dim=-1, descending=True, stable=True)
        before = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0))  # the mass of the better candidates
        within = (before < self.top_p_threshold).index_fill(1, order.new_zeros(1), True)  # the best one in any case
        active = torch.empty_like(within).scatter(1, order, within & (ordered > 0.0))  # (T, E + M)
        mass = logits.masked_fill(~(active | shared), float("-inf")).softmax(-1)  # q
        share = renormalise(active.float() if self.dynamic_weights == "uniform" else probs * active)
        weights = torch.where(shared, mass, share * (mass * active).sum(-1, keepdim=True))[:, :experts]
        runs = ((active | shared) & (logits > float("-inf")))[:, :experts]
        index, weights = from_mask(runs, weights)
        return ExpertAssignment(index, weights, experts, router_logits=dynamic, router_probs=share)
