"""Locality: tokens should go to experts of the node that they are on, since others cost communication.

    L = mean over the nodes of  KL(D_c || D_l) = s log(s / (1 - eps)) + (1 - s) log((1 - s) / eps)

D_c is the mean distribution of a node's tokens over all experts, that of the previous optimizer step, see
[`PopulationMean`], and s its share of the node's own experts. D_l has the mass 1 - eps on these and eps on the others,
and within both the shape of D_c: how evenly a node's experts are used is left to the balance loss, and L is 0 where s
is 1 - eps. L pulls towards the node and the balance loss towards all experts, so it goes with one.

The experts of E / num_nodes neighbours are on one node, as a parallel plan places them. A token is on the node of its
process, R / num_nodes neighbours of the R processes, or where a condition of its row says, which simulates nodes.

Source: LocMoE: A Low-overhead MoE for Large Language Model Training, arXiv:2401.13920.
"""

from typing import Annotated

import torch
from torch import distributed

from ...configuration.checks import Interval, PositiveInt
from ..decisions import Decision, ExpertAssignment
from ..layer_spec import MoELayerSpec, Site
from ..population import PopulationMean
from ..registry import register_objective
from ..routing_context import RoutingContext


@register_objective("locality")
class Locality(PopulationMean):
    """Divergence of every node's routing from local routing.

    Args:
        num_nodes: number of nodes; must divide E.
        smoothing: eps, the mass of D_l on remote experts, in (0, 1).
        condition: name of the node ids, less than `num_nodes`, in the call's `condition_ids`; by the process when
            absent.

    Raises:
        ValueError: if `num_nodes` does not divide E; in training, if it does not divide the number of processes.
    """

    def __init__(
        self,
        specs: list[MoELayerSpec],
        coef: float,
        *,
        num_nodes: PositiveInt = 1,
        smoothing: Annotated[float, Interval(0, 1, open_minimum=True, open_maximum=True)] = 1e-3,
        condition: str | None = None,
    ):
        super().__init__(specs, coef, num_nodes)
        for spec in specs:
            if spec.num_experts % num_nodes:
                raise ValueError(
                    f"num_nodes={num_nodes} must divide num_experts={spec.num_experts} of layer {spec.layer_idx}: "
                    "every node holds as many experts."
                )
        self.smoothing = smoothing
        self.condition = condition

    def penalty(self, mean: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        by_node = mean.unflatten(-1, (self.num_groups, -1)).sum(-1)  # (B, nodes of tokens, nodes of experts)
        local = by_node.diagonal(dim1=1, dim2=2)  # (B, nodes)
        parts = ((local, 1 - self.smoothing), (1 - local, self.smoothing))
        divergence = sum(share * (share.clamp(min=1e-9) / wanted).log() for share, wanted in parts)  # (B, nodes)
        return (divergence * present).sum(-1) / present.sum().clamp(min=1)

    def group(self, decision: ExpertAssignment, context: RoutingContext) -> torch.Tensor:
        index = decision.expert_index[:, 0]
        if self.condition is not None:
            return context.condition(self.condition, index.device)
        process, processes = place_of_process()
        return torch.full_like(index, process * self.num_groups // processes)

    def accumulate(self, decisions: dict[Site, Decision], context: RoutingContext) -> None:
        _, processes = place_of_process()
        if self.condition is None and processes % self.num_groups:
            raise ValueError(
                f"The objective 'locality' has num_nodes={self.num_groups}, and {processes} processes train, not "
                "as many on each node: set num_nodes, or name a condition that says which node a row is on."
            )
        super().accumulate(decisions, context)


def place_of_process() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
