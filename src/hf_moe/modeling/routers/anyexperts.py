"""AnyExperts: every token gets as many expert slots as it is important, and some of them may stay virtual.

For a token h of width d, in float32 throughout:

    1  importance    a = W2 gelu(W1 h),   w = sigmoid(a)
    2  fusion        h' = (1 + alpha w) h          feeds the gate and the experts, not the residual stream
    3  slots         u = sigmoid(slope a + logit(b)),   b = (K_target - K_min) / (K_max - K_min)
                     K_soft = K_min + (K_max - K_min) u,   K_tot = round(K_soft)
    4  candidates    real l = W_g h' (E)
                     virtual v_j = sg(l_(K_tot)) + o_j(h') - gamma (u - b)   for j < floor(rho K_max)
    5  filling       the K_tot best of both, at most floor(rho K_tot) of them virtual
    6  weights       g = softmax over the filled slots' logits
    7  gradient      m_r = 1[r < K_tot] + s_r - sg(s_r),   s_r = sigmoid((K_soft - r - 1/2) / tau) for slot rank r
                     weight_r = g_r m_r / sum_q g_q m_q     (the gradient passes through the sum)

A virtual slot competes at the margin, against the K_tot-th best real expert; gamma makes unimportant tokens prefer it.
It takes part in the normaliser and adds nothing to the output (or `g h'` with `virtual_output="identity"`), so its
mass attenuates the layer. Virtual and unused slots carry the index E and weight 0 and cost no matrix work; the expert
of an unused slot gets no gradient. The objective `slot_budget` holds the mean of real slots at a budget. At inference
nothing looks at another token: prefill and decoding agree, and the target may be moved without retraining.

A converted model starts as its host's gate: sigmoids take part by their logarithm in place of l, a bias on scores
moves a choice that is made among scores, groups and banks leave a token fewer candidates.

Signals per token: `importance` w, `slots` K_tot, `real_slots`, `soft_real_slots` (with gradient, for `slot_budget`),
`virtual_share`.

The abstract and public summaries give: a slot number in [K_min, K_max] per token, a capped virtual share (0.2 named),
an importance that drives it and enters a residual fusion, one router for all modalities, 8 -> about 7.2 real experts
at no loss. The rest is this library's reading; the defaults of what is not published were chosen on toys.

Source: AnyExperts: On-Demand Expert Allocation for Multimodal Language Models with Mixture of Expert,
arXiv:2511.18314.
"""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegative, Positive, PositiveInt, Share
from ..bias_balancing import BiasBalancedRouter
from ..decisions import Decision, ExpertAssignment
from ..gating import (
    apply_overrides,
    bank_sizes,
    check_groups,
    gate_logits,
    is_vision,
    limit_groups,
    mask_other_bank,
    router_scores,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext
from ..running_statistics import sum_over_ranks


# The logit by which the virtual experts of a converted model stay below its last slot.
CONVERTED_VIRTUAL_BIAS = -5.0
# Share of the newest step in the running statistics of the importance.
NEWEST_SHARE = 0.05
# softplus(SOFTPLUS_ONE) == 1.
SOFTPLUS_ONE = math.log(math.e - 1.0)


@register_router("anyexperts")
class AnyExpertsRouter(BiasBalancedRouter):
    """Importance-driven, budget-aware slots with capped virtual experts.

    Args:
        spec: facts of the layer; its `num_experts_per_tok` is K_target where `target_slots` is absent.
        min_slots: K_min, >= 1; when absent 2, or 1 where K_target is not above 2. With 1 a lone slot's weight is
            constantly 1 and the importance of its token learns nothing from the language loss: needs
            `normalise="none"` or `probe_slot`.
        max_slots: K_max, at most E; min(E, 12) when absent.
        target_slots: K_target, slots at mean importance, in [K_min, K_max]; trained strictly between them (or equal to
            both).
        max_virtual_share: rho, 0 to 1. Below `max_slots` = 1 / rho there is no room for a virtual slot.
        virtual_output: `"zero"`, or `"identity"`: a virtual slot adds its weight times h'.
        virtual_gate: `"included"`: virtual mass stays in the normaliser; `"excluded"`: real weights sum to 1, virtual
            ones are 0.
        fusion_alpha: initial alpha; 0 when a checkpoint is converted.
        importance_hidden: inner width of the importance module; max(16, d / 16) when absent.
        ste_tau: tau, > 0.
        normalise: `"filled"` as above, or `"none"`: weights are the plain probabilities over the real experts, as in
            hosts with `norm_topk_prob=False`.
        score_function: what slots compete by and a bias is added to: `"logits"`, `"softmax"` or `"sigmoid"` scores.
        routed_scaling_factor: multiplies the weights.
        n_group, topk_group, group_score: see [`TopKRouter`].
        isolated_banks: image and video tokens see the second bank of experts, all others the first.
        importance_norm: `"running_center"` subtracts from a its running mean before step 3, `"running_norm"` also
            divides by its running standard deviation: averages over the real tokens of the optimizer steps, with the
            weight 0.05 for the newest. Fusion and signals see a itself.
        probe_slot: in training, also evaluate the first unused slot at weight 0, so that a token can learn that it
            wants one more. It costs one expert row per token; without it tokens stay at K_min on our toy.
        bias_update_rate: > 0 balances the real experts by a bias on the choice in place of a loss.

    Raises:
        ValueError: if the slot bounds do not fit E or each other, or an option is out of its range.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        min_slots: PositiveInt | None = None,
        max_slots: PositiveInt | None = None,
        target_slots: Positive | None = None,
        max_virtual_share: Share = 0.2,
        virtual_output: Literal["zero", "identity"] = "zero",
        virtual_gate: Literal["included", "excluded"] = "included",
        fusion_alpha: float = 0.1,
        importance_hidden: PositiveInt | None = None,
        ste_tau: Positive = 0.5,
        normalise: Literal["filled", "none"] = "filled",
        importance_norm: Literal["none", "running_center", "running_norm"] = "none",
        probe_slot: bool = True,
        bias_update_rate: NonNegative = 0.0,
        score_function: Literal["logits", "softmax", "sigmoid"] = "logits",
        routed_scaling_factor: Positive = 1.0,
        n_group: PositiveInt = 1,
        topk_group: PositiveInt = 1,
        group_score: Literal["best_two", "best"] = "best_two",
        isolated_banks: bool = False,
    ):
        super().__init__(spec, (spec.num_experts,), bias_update_rate)
        check_groups(spec, n_group, topk_group, "anyexperts")
        if virtual_gate == "excluded" and virtual_output == "identity":
            raise ValueError(
                "virtual_gate='excluded' leaves virtual slots no weight to return their input with: set "
                "virtual_output='zero'."
            )
        self.max_slots = min(spec.num_experts, 12) if max_slots is None else max_slots
        self.target_slots = float(spec.num_experts_per_tok if target_slots is None else target_slots)
        if min_slots is None:
            # A target at an end could not be trained.
            min_slots = 2 if self.target_slots > 2 else 1
        self.min_slots = min_slots
        if not 1 <= min_slots <= self.max_slots <= spec.num_experts:
            raise ValueError(
                f"Layer {spec.layer_idx}: min_slots={min_slots} and max_slots={self.max_slots} must satisfy 1 <= "
                f"min_slots <= max_slots <= num_experts={spec.num_experts}."
            )
        self.check_budget(self.target_slots)
        if target_slots is None and self.target_is_an_end():
            raise ValueError(
                f"Layer {spec.layer_idx}: num_experts_per_tok={spec.num_experts_per_tok}, the slot target where "
                f"target_slots is absent, is an end of [min_slots, max_slots] = [{min_slots}, {self.max_slots}]. That "
                "leaves the importance without a gradient: set one of the four so that it lies strictly between."
            )
        if min_slots == 1 and normalise == "filled" and not probe_slot and self.max_slots > 1:
            raise ValueError(
                "min_slots=1 with normalise='filled' gives the importance of one-slot tokens no gradient: set "
                "min_slots=2, normalise='none' or probe_slot=True."
            )
        self.max_virtual_share = max_virtual_share
        self.virtual_output = virtual_output
        self.virtual_gate = virtual_gate
        self.fusion_alpha, self.ste_tau = fusion_alpha, ste_tau
        self.normalise = normalise
        self.probe_slot = probe_slot
        self.importance_norm = importance_norm
        if importance_norm != "none":
            # Running mean and variance of a; of the current step: count, sum and sum of squares.
            self.register_buffer("importance_statistics", torch.tensor([0.0, 1.0], dtype=torch.float64))
            self.register_buffer("importance_sums", torch.zeros(3, dtype=torch.float64))
        self.score_function = score_function
        self.routed_scaling_factor = routed_scaling_factor
        self.groups = (n_group, topk_group, group_score)
        self.bank_sizes = bank_sizes(spec, "anyexperts") if isolated_banks else None
        # In plain numbers: models are loaded on the meta device.
        self.num_virtual = int(max_virtual_share * self.max_slots + 1e-6)
        hidden = max(16, spec.hidden_size // 16) if importance_hidden is None else importance_hidden

        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.importance_in = nn.Parameter(torch.empty(hidden, spec.hidden_size))
        self.importance_in_bias = nn.Parameter(torch.empty(hidden))
        self.importance_out = nn.Parameter(torch.empty(1, hidden))
        self.importance_out_bias = nn.Parameter(torch.empty(1))
        self.alpha = nn.Parameter(torch.empty(1))
        self.slope = nn.Parameter(torch.empty(1))
        if self.num_virtual > 0:
            self.virtual_weight = nn.Parameter(torch.empty(self.num_virtual, spec.hidden_size))
            self.virtual_bias = nn.Parameter(torch.empty(self.num_virtual))
            self.gamma = nn.Parameter(torch.empty(1))

    def target_is_an_end(self) -> bool:
        """Whether all tokens get the same number of slots although more and fewer are allowed."""
        return self.target_slots in (self.min_slots, self.max_slots) and self.min_slots < self.max_slots

    def check_budget(self, budget: float | None) -> None:
        """Refuse a slot target that does not lie in [min_slots, max_slots]."""
        if budget is not None and not self.min_slots <= budget <= self.max_slots:
            raise ValueError(
                f"Layer {self.spec.layer_idx}: a budget of {budget} experts per token (target_slots, or "
                f"num_experts_per_tok where that is absent) must lie in [min_slots, max_slots] = [{self.min_slots}, "
                f"{self.max_slots}]."
            )

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.normal_(self.weight, mean=0.0, std=std)
        init.normal_(self.importance_in, mean=0.0, std=self.spec.hidden_size**-0.5)
        init.zeros_(self.importance_in_bias)
        init.normal_(self.importance_out, mean=0.0, std=std)
        init.zeros_(self.importance_out_bias)
        init.constant_(self.alpha, self.fusion_alpha)
        init.constant_(self.slope, SOFTPLUS_ONE)
        if self.importance_norm != "none":
            init.copy_(self.importance_statistics, torch.tensor([0.0, 1.0], dtype=torch.float64))
            init.zeros_(self.importance_sums)
        if self.num_virtual > 0:
            init.zeros_(self.virtual_weight)
            init.constant_(self.virtual_bias, -0.5)
            init.constant_(self.gamma, 5.0)

    @torch.no_grad()
    def start_from(self, old: Router) -> None:
        super().start_from(old)
        if isinstance(old, AnyExpertsRouter):
            return
        # Every token is of mean importance and gets the target's slots; nothing is fused and no slot is virtual.
        self.importance_out.zero_()
        self.alpha.zero_()
        if self.num_virtual > 0:
            self.virtual_bias.fill_(CONVERTED_VIRTUAL_BIAS)

    def balanced_together(self, load: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (load,) if self.bank_sizes is None else load.split(self.bank_sizes, dim=-1)

    def most_experts_per_tok(self) -> int:
        return self.max_slots

    def importance(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the importance logit a, (T,) float32."""
        inner = F.gelu(gate_logits(hidden_states, self.importance_in, self.importance_in_bias))
        return gate_logits(inner, self.importance_out, self.importance_out_bias).squeeze(-1)

    def normed(self, importance: torch.Tensor) -> torch.Tensor:
        """Return a (T,) relative to its running statistics, as `importance_norm` says."""
        if self.importance_norm == "none":
            return importance
        mean, variance = self.importance_statistics.to(importance)
        centred = importance - mean
        return centred if self.importance_norm == "running_center" else centred / (variance + 1e-6).sqrt()

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        super().accumulate(decision, context)
        if self.importance_norm == "none":
            return
        a = torch.logit(decision.signals["importance"].detach().double(), eps=1e-12)  # (T,)
        a = a[context.tokens("token_mask", a.device)]
        sums = torch.stack([torch.full_like(a.sum(), len(a)), a.sum(), a.square().sum()])
        self.importance_sums += sum_over_ranks(sums).to(self.importance_sums)

    def end_step(self) -> None:
        super().end_step()
        if self.importance_norm == "none" or self.importance_sums[0] == 0:
            return
        mean, square = self.importance_sums[1:] / self.importance_sums[0]
        fresh = torch.stack([mean, (square - mean.square()).clamp(min=0.0)])
        self.importance_statistics.lerp_(fresh, NEWEST_SHARE)
        self.importance_sums.zero_()

    def soft_slots(self, importance: torch.Tensor, target: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K_soft and u - b of every token, (T,) each, for a slot target.

        A target at or beyond an end gives every token that end: elastic inference may go all the way.
        """
        span = self.max_slots - self.min_slots
        share = (target - self.min_slots) / span if span else 0.0
        if not 0.0 < share < 1.0:
            end = float(self.max_slots if share >= 1.0 else self.min_slots)
            return torch.full_like(importance, end), torch.zeros_like(importance)
        # Bounded, so that a target near an end leaves the importance its say.
        offset = min(max(math.log(share / (1.0 - share)), -4.0), 4.0)
        use = torch.sigmoid(F.softplus(self.slope.float()) * importance + offset)
        return self.min_slots + span * use, use - share

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        a = self.importance(hidden_states)  # (T,)
        w = torch.sigmoid(a)
        scale = 1.0 + self.alpha.float() * w  # (T,)
        fused = hidden_states.float() * scale[:, None]  # (T, d)
        logits = apply_overrides(gate_logits(fused, self.weight), self.spec, context)  # (T, E)

        gate_index = None
        if self.bank_sizes is not None:
            gate_index = is_vision(context, hidden_states.device).long()  # (T,)
            logits = mask_other_bank(logits, gate_index, self.bank_sizes)

        k_soft, k_total, excess = self._slots(a, context)  # (T,) each
        candidates, choice = self._candidates(fused, logits, k_total, excess)  # (T, E + V) both
        width = min(self.max_slots + self.probe_slot, experts)
        value, index = choice.topk(width, dim=-1)  # (T, width)

        rank = torch.arange(width, device=index.device)
        filled = (rank < k_total[:, None]) & (value > float("-inf"))  # (T, width)
        soft = torch.sigmoid((k_soft[:, None] - rank - 0.5) / self.ste_tau)
        mask = filled + soft - soft.detach()  # (T, width), the slots' straight-through indicator
        real = filled & (index < experts)
        probed = (rank == k_total[:, None]) & (index < experts) if self.probe_slot and self.training else None
        weight = self._weights(candidates.gather(1, index), logits, filled, real, mask, probed)  # (T, width)
        weight = weight * self.routed_scaling_factor

        kept = real if probed is None else real | probed
        identity = (weight * (filled & ~real)).sum(-1) if self.virtual_output == "identity" else None
        return ExpertAssignment(
            expert_index=index.masked_fill(~kept, experts),
            expert_weight=weight.masked_fill(~kept, 0.0),
            num_experts=experts,
            router_logits=logits,
            router_probs=router_scores(logits, "sigmoid" if self.score_function == "sigmoid" else "softmax")[1],
            gate_index=gate_index,
            chosen_index=index.masked_fill(~real, experts),
            input_scale=scale,
            identity_weight=identity,
            signals={
                "importance": w,
                "slots": k_total.float(),
                "real_slots": real.sum(-1).float(),
                # Unfilled ranks count 0 but pass their gradient: half of the boundary lies there.
                "soft_real_slots": (mask * (index < experts)).sum(-1),
                "virtual_share": (filled & ~real).sum(-1) / k_total,
            },
        )

    def _slots(self, importance: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, ...]:
        """Return K_soft, K_tot and u - b of every token, (T,) each."""
        budget = None if context.overrides is None else context.overrides.expert_budget
        self.check_budget(budget)
        if self.training and self.target_is_an_end():
            raise ValueError(
                f"Layer {self.spec.layer_idx}: target_slots={self.target_slots} at an end of [{self.min_slots}, "
                f"{self.max_slots}] leaves the importance without a gradient: train strictly between them."
            )
        target = self.target_slots if budget is None else budget
        k_soft, excess = self.soft_slots(self.normed(importance), target)
        return k_soft, k_soft.detach().round().long().clamp(self.min_slots, self.max_slots), excess

    def _candidates(
        self, fused: torch.Tensor, logits: torch.Tensor, k_total: torch.Tensor, excess: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the slots' weights are made of and, detached, what they compete by, (T, E + V) both."""
        candidates = F.logsigmoid(logits) if self.score_function == "sigmoid" else logits  # (T, E)
        scores = logits if self.score_function == "logits" else router_scores(logits, self.score_function)[0]
        choice = scores.detach() + self.e_score_correction_bias  # (T, E)
        choice = choice.masked_fill(logits == float("-inf"), float("-inf"))
        choice = limit_groups(choice, *self.groups)
        if self.num_virtual == 0:
            return candidates, choice
        # Relative to the K_tot-th best real expert.
        ordered = (logits.detach() if self.score_function == "logits" else choice).sort(dim=-1, descending=True)
        last = k_total[:, None] - 1
        margin = candidates.detach().gather(1, ordered.indices.gather(1, last))  # (T, 1)
        offset = gate_logits(fused, self.virtual_weight, self.virtual_bias)  # (T, V)
        offset = offset - F.relu(self.gamma.float()) * excess[:, None]
        virtual = margin + offset
        # Of these the floor(rho K_tot) best may compete; the addend keeps 0.29 * 100 from coming out one short.
        rank = virtual.detach().argsort(dim=-1, descending=True).argsort(dim=-1)
        barred = rank >= (self.max_virtual_share * k_total + 1e-6).floor()[:, None]
        competing = (ordered.values.gather(1, last) + offset.detach()).masked_fill(barred, float("-inf"))
        return torch.cat([candidates, virtual], dim=-1), torch.cat([choice, competing], dim=-1)

    def _weights(
        self,
        slot_logits: torch.Tensor,
        logits: torch.Tensor,
        filled: torch.Tensor,
        real: torch.Tensor,
        mask: torch.Tensor,
        probed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the slot weights (T, width); 0 where a slot is not filled."""
        if self.normalise == "none":
            counted = filled if self.virtual_output == "identity" else real
        else:
            counted = real if self.virtual_gate == "excluded" else filled
        counted = counted if probed is None else counted | probed
        slot_logits = slot_logits.masked_fill(~counted, float("-inf"))
        if self.normalise == "none":
            # A sigmoid is a score by itself; a softmax is one among all.
            total = 0.0 if self.score_function == "sigmoid" else logits.logsumexp(-1, keepdim=True)
            return (slot_logits - total).exp() * mask
        # Over the counted slots alone: over all candidates the softmax would underflow where barred virtual ones hold
        # the mass. A token without any gets weights of 0, not NaN.
        peak = slot_logits.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weight = (slot_logits - peak).exp() * mask
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
