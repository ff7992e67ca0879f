"""Expert i serves the rows whose condition (task, domain, language, ...) is i; rows without one get none."""

import torch

from ...modeling.decisions import ExpertAssignment
from ...modeling.layer_spec import MoELayerSpec
from ...modeling.routing import Router
from ...modeling.routing_context import RoutingContext


def condition_per_token(context: RoutingContext, name: str, device: torch.device) -> torch.Tensor:
    """Return the row's condition `name` for every token: (T,) ids, or (T, C) features.

    Raises:
        ValueError: if the call of the model did not give it.
    """
    values = context.condition_ids.get(name)
    if values is None:
        raise ValueError(
            f"A router reads the condition {name!r} of every row, and the call gave none: pass {name}_ids=(B,) or "
            f"condition_ids={{{name!r}: (B,)}}, or wrap the call in hf_moe.adapters.routing_inputs({name}=...), as "
            "generation needs. task_ids never arrives where PEFT's config has a task_type, nor does any column that a "
            "collator drops: condition_ids and hf_moe.adapters.ConditionCollator bring them."
        )
    rows, positions = context.token_mask.shape
    return values.to(device).repeat_interleave(positions, dim=0)


def check_condition_ids(name: str, ids: torch.Tensor, number: int) -> None:
    """Refuse ids that no router knows.

    Raises:
        ValueError: if they are no integers, or one is `number` or more.
    """
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"The ids of the condition {name!r} must be integers, not {ids.dtype}.")
    if ids.numel() and int(ids.max()) >= number:
        raise ValueError(
            f"The ids of the condition {name!r} must be less than {number}, which a router knows, and one is "
            f"{int(ids.max())}."
        )


class ConditionRouter(Router):
    """One expert per value of a condition; no parameters.

    Args:
        spec: facts of the layer; a row whose id is negative gets no expert.
        condition: its name; the model's call takes it as `<name>_ids` or in `condition_ids`, with ids less than E.
    """

    mechanism_name = "condition"
    reads = frozenset({"condition"})

    def __init__(self, spec: MoELayerSpec, *, condition: str = "task"):
        super().__init__(spec)
        if not condition:
            raise ValueError("condition='' has no name, by which the call of the model could give it.")
        self.condition = condition
        self.num_conditions = spec.num_experts

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        experts = self.spec.num_experts
        ids = condition_per_token(context, self.condition, hidden_states.device).long()  # (T,)
        index = ids.masked_fill((ids < 0) | (ids >= experts), experts)[:, None]  # (T, 1)
        return ExpertAssignment(index, (index < experts).float(), experts)
