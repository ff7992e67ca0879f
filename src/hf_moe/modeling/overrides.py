"""Test-time control over the routing of a trained model."""

from typing import Any

import torch

from ..configuration.checks import NonNegativeInt, checked
from .layer_spec import Site


class RoutingOverrides:
    """Test-time control over a trained model's routing, without touching its weights.

    Args:
        logit_offset: site -> (E,) finite values added to the router logits.
        disabled_experts: site -> expert indices that no token may choose.
        expert_budget: experts per token that a router with a slot budget aims at, in place of its own target.

    Raises:
        ValueError: if a value is of another type; when the model is called, if it has no such site, expert or budget.
    """

    def __init__(
        self,
        logit_offset: dict[Site, torch.Tensor] | None = None,
        disabled_experts: dict[Site, list[int]] | None = None,
        expert_budget: float | None = None,
    ):
        offsets: Any = checked("logit_offset", logit_offset, dict[Site, Any] | None)
        self.logit_offset = {site: _offset(site, value) for site, value in (offsets or {}).items()}
        allowed = dict[Site, list[NonNegativeInt] | tuple[NonNegativeInt, ...] | set[NonNegativeInt]]
        disabled: Any = checked("disabled_experts", disabled_experts, allowed | None)
        self.disabled_experts = {site: sorted(set(experts)) for site, experts in (disabled or {}).items()}
        self.expert_budget = checked("expert_budget", expert_budget, float | None)

    def check_sites(self, routers: dict[Site, Any]) -> None:
        """Refuse what no router, of those by site, would read."""
        for name in ("logit_offset", "disabled_experts"):
            unknown = [site for site in getattr(self, name) if site not in routers]
            if unknown:
                raise ValueError(f"{name} names the layers {unknown}; the MoE layers are {list(routers)}.")
        if self.expert_budget is not None and all(item.target_slots is None for item in routers.values()):
            raise ValueError(
                f"expert_budget={self.expert_budget}: no router of this model has a slot budget; choose one such as "
                "'anyexperts', or leave expert_budget out."
            )

    def check_experts(self, site: Site, num_experts: int) -> None:
        """Refuse what does not fit the E experts of a site."""
        offset = self.logit_offset.get(site)
        if offset is not None and offset.shape != (num_experts,):
            raise ValueError(
                f"logit_offset[{site}] must have the shape ({num_experts},), one value per expert, got "
                f"{tuple(offset.shape)}."
            )
        disabled = self.disabled_experts.get(site, [])
        if disabled and disabled[-1] >= num_experts:
            raise ValueError(f"disabled_experts[{site}]={disabled} must lie in [0, {num_experts}).")
        if len(disabled) >= num_experts:
            raise ValueError(f"disabled_experts[{site}] leaves none of {num_experts} experts: leave one.")


def _offset(site: Site, value: Any) -> torch.Tensor:
    try:
        offset = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"logit_offset[{site}]={value!r} must be a tensor of one value per expert.") from error
    if offset.is_complex() or offset.dtype == torch.bool or not offset.isfinite().all():
        raise ValueError(
            f"logit_offset[{site}] must hold finite numbers, got {offset.tolist()}; disabled_experts keeps tokens "
            "from an expert."
        )
    return offset
