"""Contextual mixture of experts: what people know of a token's context guides the gate while it learns.

    z = W x        z'_e = z_e + kappa * log max(M_c(e), eps)
    training       the K largest of z', with the weights of softmax(z')
    inference      the K largest of z, with the weights of softmax(z)

c(e) is the context that expert e is named for. M (T, C) in [0, 1] says how possible it is that a token belongs to
each: several may be, and rows need not sum to 1. Where a batch tells nothing, M is 1 and the router is the plain one,
to the bit. The signal `context_loss` is KL(stopgrad softmax(z') || softmax(z)) per token: with the objective `signal`
the gate learns to find the context by itself, which it has to at inference.

In the paper the experts are linear models, and M weighs their responsibilities in an expectation-maximisation; this is
the same product of prior and gate, in a softmax. M comes with the call as `condition_ids={condition: (B, C)}`, or
(B, S, C) for single tokens, see `hf_moe.data.contexts`.

Source: Contextual Mixture of Experts: Integrating Knowledge into Predictive Modeling, arXiv:2211.00558.
"""

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import NonNegative, NonNegativeInt
from ..decisions import ExpertAssignment
from ..gating import assign, check_slots, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


# The least possibility: a prior of log(eps) = -13.8 that a gate can outweigh.
EPSILON = 1e-6


@register_router("cmoe_contextual")
class ContextualRouter(Router):
    """Softmax top-k, with a prior on the experts in training.

    Args:
        spec: facts of the layer.
        contexts: name of a context -> its experts, in the order of M's columns; an expert of none is always possible.
            Every expert has a context of its own when `None`.
        kappa: strength of the prior, >= 0.
        condition: the name of M in the call's `condition_ids`.
        norm_topk_prob: divide the K weights by their sum; without effect when K = 1.

    Raises:
        ValueError: if K does not lie in [1, E], there is no context, or an expert is in two of them or is none of E;
            in `forward`, if M has another number of columns than there are contexts.
    """

    reads = frozenset({"hidden_states", "condition"})
    context_of_expert: torch.Tensor

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        contexts: dict[str, list[NonNegativeInt]] | None = None,
        kappa: NonNegative = 1.0,
        condition: str = "context",
        norm_topk_prob: bool = True,
    ):
        super().__init__(spec)
        check_slots(spec, spec.num_experts, "cmoe_contextual")
        if contexts is None:
            contexts = {str(expert): [expert] for expert in range(spec.num_experts)}
        named = [expert for experts in contexts.values() for expert in experts]
        if not named or len(set(named)) < len(named) or max(named) >= spec.num_experts or not condition:
            raise ValueError(
                f"Router 'cmoe_contextual' of layer {spec.layer_idx}: contexts={contexts} maps each context to "
                f"experts of its own, in [0, {spec.num_experts}), and condition={condition!r} names them in a call."
            )
        self.contexts = contexts
        self.kappa = kappa
        self.condition, self.num_condition_features = condition, len(contexts)
        self.norm_topk_prob = norm_topk_prob and spec.num_experts_per_tok > 1
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        # The column of M for every expert; the one after the last is that of experts without a context.
        self.register_buffer("context_of_expert", torch.empty(spec.num_experts, dtype=torch.int64))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        column = {expert: index for index, experts in enumerate(self.contexts.values()) for expert in experts}
        columns = [column.get(expert, len(self.contexts)) for expert in range(self.spec.num_experts)]
        init.copy_(self.context_of_expert, torch.tensor(columns, device="cpu"))

    def prior(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return kappa log M of every expert, (T, E) float32."""
        membership = context.condition_features(str(self.condition), device).float()  # (T, C)
        if membership.shape[-1] != len(self.contexts):
            raise ValueError(
                f"The condition {self.condition!r} has {membership.shape[-1]} columns, and the router "
                f"{len(self.contexts)} contexts: {', '.join(self.contexts)}."
            )
        always = membership.new_ones(len(membership), 1)
        of_expert = torch.cat([membership, always], -1)[:, self.context_of_expert]
        return self.kappa * of_expert.clamp(min=EPSILON).log()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = gate_logits(hidden_states, self.weight)  # (T, E)
        if not self.training or self.condition not in (context.condition_ids or {}):
            decision = assign(logits, self.spec, context, norm=self.norm_topk_prob, masked=False)
            decision.signals["context_loss"] = logits.new_zeros(len(logits))
            return decision
        informed = logits + self.prior(context, logits.device)
        decision = assign(informed, self.spec, context, norm=self.norm_topk_prob, masked=False)
        target = informed.detach().log_softmax(-1)
        decision.signals["context_loss"] = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)  # (T,)
        return decision
