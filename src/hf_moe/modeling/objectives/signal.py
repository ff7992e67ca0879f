"""Signal: the mean of a value that a router reports for every token, as a loss.

    value of a row = mean over its real tokens of  decision.signals[name]

and the mean over the sites that report it. A router whose paper gives it a loss of its own, on what it alone has
computed, reports that per token and needs no objective of its own. The default, the soft slots of `anyexperts`, is a
price on compute, where `slot_budget` holds a mean.
"""

import torch

from ..decisions import Decision
from ..layer_spec import MoELayerSpec, Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("signal")
class Signal(Objective):
    """Mean of a router's signal.

    Args:
        signal: the signal's name; one without a gradient is only logged.

    Raises:
        ValueError: in `forward`, if no router reports it.
    """

    def __init__(self, specs: list[MoELayerSpec], coef: float, *, signal: str = "soft_real_slots"):
        super().__init__(specs, coef)
        self.signal = signal

    def applies_to(self, decision: Decision) -> bool:
        return self.signal in decision.signals

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        reporting = [decision for decision in decisions.values() if self.applies_to(decision)]
        if not reporting:
            known = sorted({name for decision in decisions.values() for name in decision.signals})
            raise ValueError(
                f"No router reports the signal {self.signal!r}, only {known or 'none'}: name one of these, choose a "
                "router that reports it, or remove this objective."
            )
        return self.reduce_layers([context.row_mean(decision.signals[self.signal]) for decision in reporting])
