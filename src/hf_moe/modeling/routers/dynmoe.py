"""DynMoE: every token activates the experts whose thresholds it passes, and training finds how many experts there are.

    s_e = sigmoid(tau cos(x, W_e))        a_e = 1 if s_e > sigmoid(tau G_e), else 0        k = sum_e a_e
    w_e = a_e / max(k, 1)

The gradient of a_e is that of s_e - sigmoid(tau G_e), for active experts alone. In training a token with k = 0 keeps
the residual only; at inference it gets the expert with the largest s_e. No token depends on another.

A layer holds E experts, and `active_experts` says which of them are in use: nothing changes its size within a run. In
the last `record_steps` of every `adapt_every` optimizer steps the router counts how often each was activated
(`usage`), and sums the hidden states of tokens with k = 0 (`unserved`), both by modality. Then

    1. an expert that nobody activated is switched off;
    2. if any token had k = 0, and an expert is off, the first such one is switched on with
       W_e = unserved / ||unserved|| and G_e = 0; its feed-forward is what it was before.

Two losses are signals for the objective `signal`, a third is `load_balance` with `shares: tokens`, of P_e = a_e / k:

    gate_shape   = || (W' W'^T - I) m m^T ||_F + mean_e ||W_e||     W' the unit rows of W, m the active experts
    active_share = mean_e a_e                                       a price on experts

Source: Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer Models, arXiv:2405.14297, and its
released code.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive, PositiveInt
from ..decisions import Decision, ExpertAssignment
from ..gating import apply_overrides, from_mask, gate_logits, renormalise
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext
from ..running_statistics import finite, sum_over_ranks


@register_router("dynmoe")
class DynMoERouter(Router):
    """Top-any gating with a threshold per expert.

    Args:
        spec: facts of the layer; its `num_experts` is the most that training can switch on, its `num_experts_per_tok`
            is not read.
        init_experts (`int`, *optional*): how many experts are on at first; all when absent.
        temperature (`float`, *optional*, defaults to 1.0): 1 / tau, at least 0.01.
        adapt_every (`int`, *optional*, defaults to 900): optimizer steps from one adaptation to the next.
        record_steps (`int`, *optional*, defaults to 300): how many of them are counted, the last ones.

    Raises:
        ValueError: if `init_experts` exceeds E, or `record_steps` exceeds `adapt_every`.
    """

    active_experts: torch.Tensor
    usage: torch.Tensor
    unserved: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        init_experts: PositiveInt | None = None,
        temperature: Positive = 1.0,
        adapt_every: PositiveInt = 900,
        record_steps: PositiveInt = 300,
    ):
        super().__init__(spec)
        self.init_experts = spec.num_experts if init_experts is None else init_experts
        if self.init_experts > spec.num_experts:
            raise ValueError(
                f"Router 'dynmoe' of layer {spec.layer_idx}: init_experts={init_experts} must lie in [1, num_experts="
                f"{spec.num_experts}]; num_experts is the most that training can switch on."
            )
        if record_steps > adapt_every:
            raise ValueError(
                f"Router 'dynmoe' of layer {spec.layer_idx}: record_steps={record_steps} must lie in [1, adapt_every="
                f"{adapt_every}], the steps from one adaptation to the next."
            )
        self.scale = min(1.0 / temperature, 100.0)
        self.adapt_every = adapt_every
        self.record_steps = record_steps
        self.directions = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))  # W
        self.thresholds = nn.Parameter(torch.empty(spec.num_experts))  # G
        self.register_buffer("active_experts", torch.zeros(spec.num_experts, dtype=torch.bool))
        # Of the current record, by modality.
        self.register_buffer("usage", torch.zeros(NUM_MODALITIES, spec.num_experts, dtype=torch.long))
        self.register_buffer("unserved", torch.zeros(NUM_MODALITIES, spec.hidden_size, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def initialize(self, std: float) -> None:
        init.orthogonal_(self.directions)
        init.zeros_(self.thresholds)
        for buffer in (self.usage, self.unserved, self.steps):
            init.zeros_(buffer)
        place = torch.arange(self.spec.num_experts, device=self.active_experts.device)
        init.copy_(self.active_experts, place < self.init_experts)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def gate_shape(self) -> torch.Tensor:
        """Return the loss on the directions, a scalar: they should be orthogonal, and short."""
        directions = self.directions.float()
        unit = F.normalize(directions, dim=-1)
        cosines = unit @ unit.T - torch.eye(len(unit), device=unit.device)  # (E, E)
        both = self.active_experts[:, None] & self.active_experts
        return cosines.masked_fill(~both, 0.0).norm() + directions.norm(dim=-1).mean()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        tokens = F.normalize(hidden_states.float(), dim=-1)
        logits = gate_logits(tokens, self.scale * F.normalize(self.directions.float(), dim=-1))  # (T, E)
        logits = apply_overrides(logits.masked_fill(~self.active_experts, float("-inf")), self.spec, context)
        ahead = F.relu(logits.sigmoid() - (self.scale * self.thresholds.float()).sigmoid())  # (T, E)
        active = ahead > 0.0
        none = ~active.any(-1)  # (T,)
        if self.training:
            self._leave_unserved(hidden_states, none, context)
        else:
            best = F.one_hot(logits.argmax(-1), self.spec.num_experts).bool()
            active = active | (best & none[:, None] & (logits > float("-inf")))
        gate = active + (ahead - ahead.detach())  # 0 or 1, with the gradient of `ahead`
        weight = gate / active.sum(-1, keepdim=True).clamp(min=1)
        index, weight = from_mask(active, weight)  # (T, E) both
        return ExpertAssignment(
            index,
            weight,
            self.spec.num_experts,
            router_logits=logits,
            router_probs=renormalise(gate),
            signals={"active_share": gate.mean(-1), "gate_shape": self.gate_shape().expand(len(gate))},
        )

    def _leave_unserved(self, hidden_states: torch.Tensor, none: torch.Tensor, context: RoutingContext) -> None:
        """Leave the sums of the unserved tokens, by modality, for the end of the forward."""
        counted = none & context.tokens("token_mask", none.device)
        modality = F.one_hot(context.tokens("modality_ids", none.device), NUM_MODALITIES)  # (T, M)
        sums = (modality * counted[:, None]).float().T @ hidden_states.detach().float()  # (M, d)
        context.carry.setdefault("unserved", {})[self.spec.site] = sums

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        if not isinstance(decision, ExpertAssignment):
            return
        recorded = self.steps % self.adapt_every >= self.adapt_every - self.record_steps
        device = decision.expert_index.device
        modality, real = context.tokens("modality_ids", device), context.tokens("token_mask", device)
        self.usage += recorded * sum_over_ranks(decision.slot_counts(modality, NUM_MODALITIES, real))
        self.unserved += recorded * finite(sum_over_ranks(context.carry["unserved"][self.spec.site]))

    @torch.no_grad()
    def end_step(self) -> None:
        self.steps += 1
        unserved = self.unserved.sum(0)  # (d,)
        used, waiting = self.usage.sum(0) > 0, unserved.any()
        due = (self.steps % self.adapt_every == 0) & (used.any() | waiting)
        kept = self.active_experts & used
        first_off = torch.arange(len(kept), device=kept.device) == kept.long().argmin()
        new = first_off & ~kept & waiting & due  # (E,)
        self.active_experts.copy_(torch.where(due, kept, self.active_experts) | new)
        self.directions.copy_(torch.where(new[:, None], F.normalize(unserved, dim=0), self.directions))
        self.thresholds.copy_(self.thresholds.masked_fill(new, 0.0))
        self.usage *= ~due
        self.unserved *= ~due
