"""Expert i serves the rows whose condition (task, domain, language, ...) is i; rows without one get none.

    expert = rule[id]        weight 1        K = 1, whatever `num_experts_per_tok` says

The ids are of rows, or of tokens: a segment of a dialogue, say. What is generated goes on in the segment of the last
token of the prompt.

Sources: DEMix Layers: Disentangling Domains for Modular Language Modeling, arXiv:2108.05036; PaCE: Unified Multi-modal
Dialogue Pre-training with Progressive and Compositional Experts, arXiv:2305.14839.
"""

import torch

from ..decisions import ExpertAssignment
from ..gating import looked_up
from ..layer_spec import MoELayerSpec
from ..registry import register_router
from ..routing import Router
from ..routing_context import RoutingContext


@register_router("condition")
class ConditionRouter(Router):
    """An expert for every value of a condition; no parameters.

    Args:
        spec: facts of the layer; a row whose id is negative gets no expert.
        condition: its name in the call's `condition_ids`; LoRA experts take `<name>_ids` too.
        rule: the expert of every id, -1 for none; expert i for id i when `None`.

    Raises:
        ValueError: if the condition has no name, or the rule names other experts than there are.
    """

    reads = frozenset({"condition"})

    def __init__(
        self, spec: MoELayerSpec, *, condition: str = "task", rule: list[int] | tuple[int, ...] | None = None
    ):
        super().__init__(spec)
        if not condition:
            raise ValueError("condition='' has no name, by which the call of the model could give it.")
        self.condition = condition
        if rule is not None and not (rule and all(-1 <= expert < spec.num_experts for expert in rule)):
            raise ValueError(
                f"Router 'condition' of layer {spec.layer_idx}: rule={list(rule)} names the expert of every id, in "
                f"[0, {spec.num_experts}), or -1 for none."
            )
        self.rule = rule
        self.num_conditions = spec.num_experts if rule is None else len(rule)

    def most_experts_per_tok(self) -> int:
        return 1

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        ids = context.condition(self.condition, hidden_states.device)  # (T,)
        index = ids if self.rule is None else looked_up(self.rule, ids)
        index = index.masked_fill((ids < 0) | (ids >= self.num_conditions) | (index < 0), experts)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < experts).float(), experts)
