"""Domain experts: a noisy gate per domain, one decision for a sample.

    [c ; n] = W_domain h        l_t = c_t + N(0, 1) * (softplus(n_t) + 0.01)        noise while training alone
    z = sum over the counted tokens of l        S = the K largest of z        w = softmax over the kept z

Domains share the experts and differ in their gates. The objective `condition_information` makes the experts
specialise.

Source: BECoTTA: Input-dependent Online Blending of Experts for Continual Test-time Adaptation, arXiv:2402.08712.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import NonNegativeInt, PositiveInt
from ..decisions import ExpertAssignment
from ..gating import apply_overrides, check_slots, per_gate_logits, per_row_logits
from ..layer_spec import MoELayerSpec
from ..pooling import PooledRouter
from ..registry import register_router
from ..routing_context import RoutingContext


@register_router("becotta")
class BecottaRouter(PooledRouter):
    """Noisy top-k over pooled scores, with one gate per domain.

    Args:
        num_domains: D. A row without a domain, whose id is negative, gets no expert.
        condition: name of the domain ids in the call's `condition_ids`; LoRA experts take `<name>_ids` too.
        modalities, end_token_id, end, pooling: what is pooled, and how, see [`PooledRouter`]; with `"mean"`, a long
            sample has no sharper gate than a short one.

    Raises:
        ValueError: if K does not lie in [1, E]; when the model is called, if a domain is not less than D.
    """

    reads = frozenset({"hidden_states", "sequence", "condition"})

    def __init__(
        self,
        spec: MoELayerSpec,
        *,
        num_domains: PositiveInt = 4,
        condition: str = "domain",
        modalities: list[str] | tuple[str, ...] | None = None,
        end_token_id: NonNegativeInt | None = None,
        end: str = "last",
        pooling: str = "sum",
    ):
        super().__init__(spec, modalities, end_token_id, end, pooling)
        check_slots(spec, spec.num_experts, "becotta")
        self.num_domains = self.num_conditions = num_domains
        if not condition:
            raise ValueError("condition='' has no name, by which the call of the model could give it.")
        self.condition = condition
        self.weight = nn.Parameter(torch.empty(num_domains, 2 * spec.num_experts, spec.hidden_size))

    def initialize(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def idle_parameters(self) -> int:
        # One domain's gate works, and outside of training without its noise.
        return self.weight.numel() - self.weight[0].numel() // 2

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        domain = context.condition(self.condition, hidden_states.device)  # (T,)
        of_row = context.row_condition(self.condition, hidden_states.device)  # (B,)
        gates = self.weight if self.training else self.weight[:, : self.spec.num_experts]
        if of_row is None:
            logits = per_gate_logits(hidden_states, gates, domain.clamp(min=0))  # (T, 2E), or (T, E)
        else:
            logits = per_row_logits(hidden_states, gates, of_row.clamp(min=0))
        if self.training:
            logits, raw = logits.chunk(2, dim=-1)  # (T, E) both
            logits = logits + torch.randn_like(logits) * (F.softplus(raw) + 0.01)
        logits, known = self.pool(logits, context)
        logits = apply_overrides(logits, self.spec, context)
        value, index = logits.topk(self.spec.num_experts_per_tok, dim=-1)  # (T, K) both
        decision = ExpertAssignment(
            index,
            value.softmax(-1),
            self.spec.num_experts,
            router_logits=logits,
            router_probs=logits.softmax(-1),
        )
        return decision.drop(~known | (domain < 0))
