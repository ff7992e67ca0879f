"""Expert choice: every expert takes the tokens that suit it best, equally many in each group of tokens.

    P = softmax(W x)        expert e takes the k = ceil(f n K / E) tokens of a group of n with the largest P_e
    w_{t,e} = P_{t,e}       if e takes t

Loads are even by construction, so there is no balance loss. A token has 0 to E experts, f K on average.

With `max_experts_per_tok` b the choice is by the solution of a linear program in place of P, see [`capped`]: loads
stay exact, and most tokens have at most b experts; at inference all have. It takes 100 rounds of 20 T E operations, as
many as the gate of d = 1000, but none of them in products of matrices: on one core a training pass of the router took
42 times as long as `top_k`'s (T = 4096, E = 64, d = 512).

**Inference.** The choice sees later tokens, and in groups of the batch other rows. It is made in training, and where
attention sees the whole row (towers, encoders) at inference too, unless the group is the batch. Elsewhere the paper
has no rule. This library's: an expert takes every token whose P_e reaches a threshold h_e, and a token keeps its b
best, so no token depends on another. After every optimizer step

    log h_e += rate (F / s - 1)        F = the share of the step's tokens with P_e >= h_e        s = f K / E

which makes an expert's mean load that of training. A mean of the least P_e that is taken does not: it is the quantile
of a group, biased where groups are small or unlike each other.

Source: Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive, PositiveInt, Share
from ..admission import capped, group_sizes, room, take_best
from ..decisions import Decision, ExpertAssignment
from ..gating import apply_overrides, assign, check_slots, from_mask, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import NUM_MODALITIES, RoutingContext
from ..running_statistics import sum_over_ranks


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Softmax gate, the best tokens of every expert.

    Args:
        spec (`MoELayerSpec`): facts of the layer; K is the mean number of experts of a token.
        capacity_factor (`float`, *optional*, defaults to 1.0): f.
        group (`str`, *optional*, defaults to `"image"`): what an expert chooses from: every image (a run of image
            tokens, or a video, or a sound) and the text of a sequence by themselves, the `"sequence"`, or all tokens
            of the `"batch"` in a process. Packed documents are sequences.
        max_experts_per_tok (`int`, *optional*): b; no cap when `None`.
        decode_mode (`str`, *optional*, defaults to `"threshold"`): the rule where the choice may not be made:
            `"threshold"` as above, or `"token_choice"`: a token takes its K best experts, and any number of them may
            go to one expert.
        threshold_rate (`float`, *optional*, defaults to 0.05): rate; 0 freezes the thresholds.

    Raises:
        ValueError: if K does not lie in [1, E], or b not in [f K, E].
    """

    threshold: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        capacity_factor: Positive = 1.0,
        group: Literal["image", "sequence", "batch"] = "image",
        max_experts_per_tok: PositiveInt | None = None,
        decode_mode: Literal["threshold", "token_choice"] = "threshold",
        threshold_rate: Share = 0.05,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "expert_choice")
        wanted = capacity_factor * spec.num_experts_per_tok
        if max_experts_per_tok is not None and not wanted <= max_experts_per_tok <= spec.num_experts:
            raise ValueError(
                f"Layer {spec.layer_idx}: max_experts_per_tok={max_experts_per_tok} must lie in [{wanted:g}, "
                f"{spec.num_experts}], from capacity_factor * num_experts_per_tok, the mean number of experts of a "
                "token, to num_experts; leave it out for no cap."
            )
        self.share = wanted / spec.num_experts
        self.group = group
        self.max_experts_per_tok = max_experts_per_tok
        self.decode_mode = decode_mode
        self.threshold_rate = threshold_rate
        self.reads = frozenset({"hidden_states", "sequence"} | ({"modality"} if group == "image" else set()))
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        # Groups of one modality have thresholds of their own, (G, E).
        shape = (NUM_MODALITIES if group == "image" else 1, spec.num_experts)
        self.register_buffer("threshold", torch.empty(shape, dtype=torch.float32))
        # How many tokens of the current step were above it, and how many there were.
        self.register_buffer("counts", torch.empty(2, *shape, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        init.constant_(self.threshold, 1.0 / self.spec.num_experts)
        init.zeros_(self.counts)

    def most_experts_per_tok(self) -> int:
        return self.spec.num_experts

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        chooses = self.training or not (self.spec.causal or self.group == "batch")
        if not chooses and self.decode_mode == "token_choice":
            return assign(logits, self.spec, context, norm=False, masked=False)
        logits = apply_overrides(logits, self.spec, context)
        probs = logits.softmax(-1)
        if chooses:
            chosen, most = self.choice(probs.detach(), context), None
        else:
            chosen, most = probs >= self.threshold[self.kind(context, probs)], self.max_experts_per_tok
        index, weight = from_mask(chosen & (logits > float("-inf")), probs, most)
        return ExpertAssignment(index, weight, self.spec.num_experts, router_logits=logits, router_probs=probs)

    def choice(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return which tokens every expert takes, (T, E) bool, of their scores (T, E)."""
        group = self.groups(context, scores.device)
        capacity = room(group_sizes(group), self.share).masked_fill(group == 2 * len(group), 0.0)  # (T,)
        if self.max_experts_per_tok is not None:
            scores = capped(scores, group, capacity, self.max_experts_per_tok)
        return take_best(scores, group, capacity)

    def groups(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the group of every token, (T,) in [0, 2 T), or 2 T where it is padding."""
        mask = context.token_mask.to(device)  # (B, S)
        group = torch.zeros_like(mask, dtype=torch.long)
        if self.group != "batch":
            place = torch.arange(mask.numel(), device=device).view(mask.shape)
            documents = group if context.documents is None else context.documents.to(device)
            changes = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)  # (B, S)
            group = place.masked_fill(~changes, 0).cummax(1).values  # by its first token
            if self.group == "image":
                modality = context.modality_ids.to(device)
                changes = changes | F.pad(modality.diff(dim=1) != 0, (1, 0), value=True)
                runs = place.masked_fill(~changes, 0).cummax(1).values
                group = torch.where(modality == 0, group + mask.numel(), runs)
        return group.masked_fill(~mask, 2 * mask.numel()).flatten()

    def kind(self, context: RoutingContext, like: torch.Tensor) -> torch.Tensor:
        """Return which of the thresholds is every token's, (T,)."""
        if self.group == "image":
            return context.tokens("modality_ids", like.device)
        return torch.zeros(len(like), dtype=torch.long, device=like.device)

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        assert isinstance(decision, ExpertAssignment)
        probs, kind = decision.router_probs.detach(), self.kind(context, decision.router_probs)
        # An expert that is switched off says nothing of its threshold.
        known = context.tokens("token_mask", probs.device)[:, None] & (decision.router_logits > float("-inf"))
        counts = torch.stack([known & (probs >= self.threshold[kind]), known]).float()  # (2, T, E)
        self.counts += sum_over_ranks(torch.zeros_like(self.counts).index_add(1, kind, counts))

    def end_step(self) -> None:
        above, tokens = self.counts
        ahead = above / (tokens * min(self.share, 1.0)).clamp(min=1e-6) - 1.0
        self.threshold *= (self.threshold_rate * ahead.masked_fill(tokens == 0, 0.0)).exp()
        self.counts.zero_()
