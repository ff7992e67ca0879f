"""Elastic inference: moving the number of experts per token of a trained model."""

from typing import Any

import torch

from ..configuration.layer_maps import at_layer
from .overrides import RoutingOverrides
from .routing import Router


class ElasticBudget:
    """What a model whose routers have a slot budget can do; to be inherited before `GenerationMixin`."""

    config: Any
    moe_layers: Any

    def set_expert_budget(self, budget: float | None) -> None:
        """Move the number of experts per token that the routers aim at, without training; the config keeps it.

        Args:
            budget: within the routers' [min_slots, max_slots]; `None` for every layer's `num_experts_per_tok`.

        Raises:
            ValueError: if no router has a slot budget, or the budget is out of range.
        """
        routers = self._budgeted_routers(budget)
        moe_config = self.config.moe_config
        options = {str(layer): dict(at_layer(moe_config.router, layer)) for layer in self.moe_layers()}
        for layer, router in routers.items():
            target = float(router.spec.num_experts_per_tok if budget is None else budget)
            # PEFT puts a copy of a gate that it trains beside the original, and a wrapper around both.
            for module in self.moe_layers()[layer].gate.modules():
                if isinstance(module, Router):
                    module.target_slots = target
            # The router derives its least number of slots from its target where the config does not tell.
            options[str(layer)] |= {"target_slots": budget, "min_slots": router.min_slots}
        first = next(iter(options.values()))
        moe_config.router = first if all(item == first for item in options.values()) else options

    @torch.no_grad()
    def generate(self, *args: Any, expert_budget: float | None = None, **kwargs: Any) -> Any:
        """Generate with `expert_budget` experts per token in place of the model's own target."""
        if expert_budget is not None:
            self._budgeted_routers(expert_budget)
            given = kwargs.get("routing_overrides") or RoutingOverrides()
            kwargs["routing_overrides"] = RoutingOverrides(given.logit_offset, given.disabled_experts, expert_budget)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _budgeted_routers(self, budget: float | None) -> dict[int, Any]:
        """Return the routers with a slot budget by layer, after `budget` was checked against their range."""
        routers = {
            index: layer.router for index, layer in self.moe_layers().items() if hasattr(layer.router, "target_slots")
        }
        if not routers:
            raise ValueError("No router of this model has a slot budget: choose one such as 'anyexperts'.")
        for router in routers.values():
            router.check_budget(budget)
        return routers
