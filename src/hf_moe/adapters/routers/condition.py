"""Expert i serves the rows whose condition (task, domain, language, ...) is i; rows without one get none."""

import torch

from ...modeling.routing import ExpertAssignment, MoELayerSpec, Router, RoutingContext


def condition_per_token(context: RoutingContext, name: str, device: torch.device) -> torch.Tensor:
    """Return the row's condition `name` for every token: (T,) ids, or (T, C) features.

    Raises:
        ValueError: if the call of the model did not give it.
    """
    values = context.condition_ids.get(name)
    if values is None:
        raise ValueError(
            f"A router reads the condition {name!r} of every row, and the call gave none: pass {name}_ids=(B,) or "
            f"condition_ids={{{name!r}: (B,)}} to a model whose layers take keyword arguments, or wrap the call in "
            f"hf_moe.adapters.routing_inputs({name}=...), as generation needs."
        )
    rows, positions = context.token_mask.shape
    return values.to(device).repeat_interleave(positions, dim=0)


class ConditionRouter(Router):
    """One expert per value of a condition; no parameters.

    Args:
        spec: facts of the layer; a row whose id does not lie in [0, num_experts) gets no expert.
        condition: its name; the model's call takes it as `<name>_ids` or in `condition_ids`.
    """

    mechanism_name = "condition"

    def __init__(self, spec: MoELayerSpec, *, condition: str = "task"):
        super().__init__(spec)
        self.condition = condition

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        ids = condition_per_token(context, self.condition, hidden_states.device).long()  # (T,)
        index = ids.masked_fill((ids < 0) | (ids >= experts), experts)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < experts).float(), experts)
