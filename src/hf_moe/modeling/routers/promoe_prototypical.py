"""ProMoE routing: tokens of a reserved role have an expert of their own, all others go to their nearest prototypes.

    z_e = cos(x, C_e)      S = the K largest of z      w_e = max(z_e, 0), sigmoid(z_e) or softmax(z)_e    for e in S

The weights are not renormalised. Reserved tokens use their expert with weight 1 and see no prototype. A negative z,
which the released code takes as a weight, weighs 0 here: no other router subtracts an expert's output.

The signal `prototype_contrast`, for the objective `signal`, draws every prototype to the mean m_e of its tokens and
away from the means of others. It takes the place of a balance loss:

    L = mean over e in U of  -log( exp(cos(C_e, m_e) / tau) / sum over f in U of exp(cos(C_e, m_f) / tau) )

U are the experts with tokens; with one alone, L is 0. The means are those of the previous optimizer step, and a token
has the gradient that it would have in that step's means, which is linear in the tokens. In training the loss costs
E T d products for the sums, as many as the cosines do, again in the backward pass, and E^2 d for every row. Training
and inference route alike.

Source: Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance, arXiv:2510.24711, and
its released code. There the reserved role is that of samples without a class; text or images can have it here.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import Positive
from ...configuration.configuration_hf_moe import MODALITIES
from ..decisions import Decision, ExpertAssignment
from ..gating import (
    apply_overrides,
    by_modality,
    check_choice,
    check_slots,
    gate_logits,
    router_scores,
    select_experts,
)
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext
from ..running_statistics import finite, sum_over_ranks


@register_router("promoe_prototypical")
class PrototypicalRouter(Router):
    """Cosine top-k of the prototypes, `prototypes` (P, d), P being E without the reserved experts, which come last.

    Args:
        score: `"identity"`, `"sigmoid"` or `"softmax"`, what the cosine becomes as a weight.
        contrast_tau: tau, the temperature of the loss.
        reserved_modalities: modalities whose tokens go to a reserved expert, one for each in this order.
        reserved_condition: name of a condition whose rows of id 0 go to the last expert; those with a negative id have
            no reserved role by it.

    Raises:
        ValueError: if a modality is unknown or named twice, or K does not lie in [1, P].
    """

    population: torch.Tensor
    accumulated: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        score: Literal["identity", "sigmoid", "softmax"] = "identity",
        contrast_tau: Positive = 0.07,
        reserved_modalities: list[str] | tuple[str, ...] = (),
        reserved_condition: str | None = None,
    ):
        super().__init__(spec)
        for name in reserved_modalities:
            check_choice("reserved_modalities", name, MODALITIES)
        if len(set(reserved_modalities)) != len(reserved_modalities):
            raise ValueError(f"reserved_modalities={list(reserved_modalities)!r} must name each modality once.")
        self.num_prototypes = spec.num_experts - len(reserved_modalities) - (reserved_condition is not None)
        check_slots(spec, self.num_prototypes, "promoe_prototypical")
        self.score = score
        self.contrast_tau = contrast_tau
        places = {name: self.num_prototypes + index for index, name in enumerate(reserved_modalities)}
        self.expert_of_modality = [places.get(name, -1) for name in MODALITIES]
        if reserved_modalities:
            self.reads |= {"modality"}
        if reserved_condition is not None:
            self.reads |= {"condition"}
            self.condition, self.num_conditions = reserved_condition, 1
        self.prototypes = nn.Parameter(torch.empty(self.num_prototypes, spec.hidden_size))
        # By prototype the sum of its tokens and, last, their number; in a last row the number of all tokens. Of the
        # previous step, and of the current one.
        for name in ("population", "accumulated"):
            self.register_buffer(name, torch.zeros(self.num_prototypes + 1, spec.hidden_size + 1, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        init.normal_(self.prototypes, mean=0.0, std=std)
        init.zeros_(self.population)
        init.zeros_(self.accumulated)

    def reserved(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the reserved expert of every token, (T,), -1 where it has none."""
        if "modality" in self.reads:
            expert = by_modality(self.expert_of_modality, context, device)
        else:
            expert = torch.full((context.token_mask.numel(),), -1, device=device)
        if self.condition is not None:
            expert = expert.masked_fill(context.condition(self.condition, device) == 0, self.spec.num_experts - 1)
        return expert

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        length = hidden_states.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)  # (T, 1)
        logits = gate_logits(hidden_states, F.normalize(self.prototypes.float(), dim=-1)) / length  # (T, P)
        logits = F.pad(logits, (0, self.spec.num_experts - self.num_prototypes), value=float("-inf"))  # (T, E)
        reserved = self.reserved(context, logits.device)[:, None]  # (T, 1)
        own = reserved == torch.arange(self.spec.num_experts, device=logits.device)  # (T, E)
        logits = logits.masked_fill(reserved >= 0, float("-inf")).masked_fill(own, 1.0)
        logits = apply_overrides(logits, self.spec, context)
        scores, probs = router_scores(logits, "sigmoid" if self.score == "sigmoid" else "softmax")  # (T, E) both
        index, weight = select_experts(scores, logits, self.spec)  # (T, K) both
        if self.score == "identity":
            weight = F.pad(logits.clamp(min=0.0), (0, 1)).gather(1, index)
        return ExpertAssignment(
            index,
            torch.where(reserved >= 0, (index < self.spec.num_experts).to(weight), weight),
            self.spec.num_experts,
            router_logits=logits,
            router_probs=probs.nan_to_num(0.0),  # a reserved expert that is switched off leaves no candidate
            signals={"prototype_contrast": self.contrast(hidden_states, index, context)},
        )

    def contrast(self, hidden_states: torch.Tensor, index: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return the loss on the prototypes for every token, the same within a row, (T,)."""
        count = self.population[:-1, -1:]  # (P, 1)
        mean = (self.population[:-1, :-1] / count.clamp(min=1))[None]  # (1, P, d), and in training (B, P, d)
        if self.training:
            own, tokens = self.row_sums(hidden_states, index, context)
            weight = self.population[-1, -1] / (count.clamp(min=1) * tokens[:, None, None].clamp(min=1))  # (B, P, 1)
            mean = mean + (own - own.detach()) * weight
        used = count[:, 0] > 0  # (P,)
        # Row f, column e: the mean of f against the prototype of e.
        cosines = gate_logits(F.normalize(mean, dim=-1), F.normalize(self.prototypes.float(), dim=-1))  # (B, P, P)
        scaled = (cosines / self.contrast_tau).masked_fill(~used[:, None], -1e4)  # exp of which is 0
        loss = scaled.logsumexp(1) - scaled.diagonal(dim1=1, dim2=2)  # (B, P)
        value = (loss * used).sum(-1) / used.sum().clamp(min=1)  # (B,)
        return value[:, None].expand(context.token_mask.shape).flatten()

    def row_sums(
        self, hidden_states: torch.Tensor, index: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of every row's tokens by prototype, (B, P, d), and how many tokens it has, (B,).

        The sums over all rows are left for the end of the forward.
        """
        mask = context.token_mask.to(index.device)  # (B, S)
        place = index.clamp(max=self.num_prototypes).masked_fill(~mask.view(-1, 1), self.num_prototypes)  # (T, K)
        chosen = torch.zeros(len(place), self.num_prototypes + 1, device=place.device).scatter(1, place, 1.0)
        chosen = chosen[:, :-1].view(*mask.shape, -1).mT  # (B, P, S)
        with torch.autocast(mask.device.type, enabled=False):
            own = chosen @ hidden_states.float().view(*mask.shape, -1)
        tokens = mask.sum(-1)
        sums = torch.cat([own.detach(), chosen.sum(-1, keepdim=True)], dim=-1).sum(0)  # (P, d + 1)
        sums = F.pad(sums, (0, 0, 0, 1))  # (P + 1, d + 1)
        sums[-1, -1] = tokens.sum()
        context.carry.setdefault("prototype_sums", {})[self.spec.site] = sums
        return own, tokens

    def accumulate(self, decision: Decision, context: RoutingContext) -> None:
        sums = context.carry.get("prototype_sums", {}).get(self.spec.site)
        if sums is not None:
            self.accumulated += finite(sum_over_ranks(sums)).to(self.accumulated)

    def end_step(self) -> None:
        self.population.copy_(torch.where(self.accumulated[-1, -1] > 0, self.accumulated, self.population))
        self.accumulated.zero_()
