# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""Test-time control over the routing of a trained model."""

from typing import Any

import torch

from .checks import NonNegativeInt, checked


class RoutingOverrides:
    """Test-time control over a trained model's routing, without touching its weights.

    Args:
        logit_offset: layer index -> (E,) finite values added to the router logits.
        disabled_experts: layer index -> expert indices that no token may choose.
        expert_budget: experts per token that a router with a slot budget aims at, in place of its own target.

    Raises:
        ValueError: if a value is of another type; when the model is called, if it has no such layer, expert or budget.
    """

    def __init__(
        self,
        logit_offset: dict[int, torch.Tensor] | None = None,
        disabled_experts: dict[int, list[int]] | None = None,
        expert_budget: float | None = None,
    ):
        offsets: dict[int, Any] = checked("logit_offset", {} if logit_offset is None else logit_offset, dict[int, Any])
        self.logit_offset = {layer: _offset(layer, value) for layer, value in offsets.items()}
        allowed = dict[int, list[NonNegativeInt] | tuple[NonNegativeInt, ...] | set[NonNegativeInt]]
        disabled: dict[int, Any] = checked(
            "disabled_experts", {} if disabled_experts is None else disabled_experts, allowed
        )
        self.disabled_experts = {layer: sorted(set(experts)) for layer, experts in disabled.items()}
        self.expert_budget = checked("expert_budget", expert_budget, float | None)

    def check_layers(self, routers: dict[int, Any]) -> None:
        """Refuse what no router of a model would read.

        Args:
            routers: layer index -> router.

        Raises:
            ValueError: if a layer is no MoE layer, or there is a budget and no router that has one.
        """
        for name in ("logit_offset", "disabled_experts"):
            unknown = sorted(set(getattr(self, name)) - set(routers))
            if unknown:
                raise ValueError(f"{name} names the layers {unknown}; the MoE layers are {sorted(routers)}.")
        if self.expert_budget is not None and not any(hasattr(item, "target_slots") for item in routers.values()):
            raise ValueError(
                f"expert_budget={self.expert_budget}: no router of this model has a slot budget; choose one such as "
                "'anyexperts', or leave expert_budget out."
            )

    def check_experts(self, layer: int, num_experts: int) -> None:
        """Refuse what does not fit the E experts of a layer.

        Raises:
            ValueError: if an offset has another length, an expert does not exist, or none is left.
        """
        offset = self.logit_offset.get(layer)
        if offset is not None and offset.shape != (num_experts,):
            raise ValueError(
                f"logit_offset[{layer}] must have the shape ({num_experts},), one value per expert, got "
                f"{tuple(offset.shape)}."
            )
        disabled = self.disabled_experts.get(layer, [])
        if disabled and disabled[-1] >= num_experts:
            raise ValueError(f"disabled_experts[{layer}]={disabled} must lie in [0, {num_experts}).")
        if len(disabled) >= num_experts:
            raise ValueError(f"disabled_experts[{layer}] leaves none of {num_experts} experts: leave one.")


def _offset(layer: int, value: Any) -> torch.Tensor:
    try:
        offset = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"logit_offset[{layer}]={value!r} must be a tensor of one value per expert.") from error
    if offset.is_complex() or offset.dtype == torch.bool or not offset.isfinite().all():
        raise ValueError(
            f"logit_offset[{layer}] must hold finite numbers, got {offset.tolist()}; disabled_experts keeps tokens "
            "from an expert."
        )
    return offset
