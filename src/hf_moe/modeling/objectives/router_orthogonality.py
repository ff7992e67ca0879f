"""Router orthogonality: the rows of a gate point in different directions, so that experts differ in what they get.

    value of a row = mean over i != j of  cos(W_i, W_j)^2

over the rows of the gate (of each bank's gate by itself where banks are isolated), and the mean over layers. It looks
at no token: every row of the batch has the same value, 0 for orthogonal rows and 1 for parallel ones.

ERNIE 4.5 names such a loss and gives no formula; this one was chosen for being free of the rows' length.
Source: ERNIE 4.5 Technical Report (2025).
"""

import torch

from ..decisions import Decision
from ..layer_spec import Site
from ..registry import register_objective
from ..routing import Objective
from ..routing_context import RoutingContext


@register_objective("router_orthogonality")
class RouterOrthogonality(Objective):
    """Squared cosines between the rows of a gate; ERNIE's coefficient is not published, 0.001 was chosen.

    Raises:
        ValueError: in `forward`, if no router gives the signal `gate_overlap`.
    """

    reads = frozenset({"gate_overlap"})

    def forward(self, decisions: dict[Site, Decision], context: RoutingContext) -> torch.Tensor:
        overlaps = [d.signals["gate_overlap"] for d in decisions.values() if "gate_overlap" in d.signals]
        if not overlaps:
            raise ValueError(
                f"router_orthogonality needs a router that gives the signal 'gate_overlap', such as 'ernie45_vl'; the "
                f"routers of layers {list(decisions)} do not: choose another router, or remove this objective."
            )
        return self.reduce_layers([context.row_mean(overlap) for overlap in overlaps])
