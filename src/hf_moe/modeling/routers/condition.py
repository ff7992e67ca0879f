"""Expert i serves the rows whose condition (task, domain, language, ...) is i; rows without one get none."""

import torch

from ..decisions import ExpertAssignment
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("condition")
class ConditionRouter(Router):
    """One expert per value of a condition; no parameters.

    Args:
        spec: facts of the layer; a row whose id is negative gets no expert.
        condition: its name in the call's `condition_ids`, with ids less than E; LoRA experts take `<name>_ids` too.
    """

    reads = frozenset({"condition"})

    def __init__(self, spec: MoELayerSpec, *, condition: str = "task"):
        super().__init__(spec)
        if not condition:
            raise ValueError("condition='' has no name, by which the call of the model could give it.")
        self.condition = condition
        self.num_conditions = spec.num_experts

    def most_experts_per_tok(self) -> int:
        return 1

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        ids = context.condition(self.condition, hidden_states.device)  # (T,)
        index = ids.masked_fill((ids < 0) | (ids >= experts), experts)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < experts).float(), experts)
