"""Whether experts differ: their similarity, what each modality uses, and what a shuffled router costs.

The shuffle test permutes the columns of every router: where experts are interchangeable, the loss does not change.
Source of the test: EvoMoE, arXiv:2505.23830.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from ..modeling.experts.ffn import FfnExperts
from ..modeling.moe_layer import MoELayer
from ..modeling.routing import ExpertAssignment, RoutingContext
from .routing_statistics import RoutingStatistics


@torch.no_grad()
def weight_similarity(layer: MoELayer) -> torch.Tensor:
    """Return the cosines between the weights of a layer's experts, (E, E) float32.

    Raises:
        ValueError: if the experts are no single bank of feed-forwards.
    """
    experts = _bank(layer)
    flat = torch.cat([stack.detach().float().flatten(1) for stack in experts.parameters()], dim=1)  # (E, weights)
    flat = F.normalize(flat, dim=-1)
    return (flat @ flat.T).cpu()


@torch.no_grad()
def output_similarity(layer: MoELayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the cosines between the outputs of a layer's experts on the same tokens, averaged, (E, E) float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): what reaches the layer.

    Raises:
        ValueError: if the experts are no single bank of feed-forwards.
    """
    experts = _bank(layer)
    outputs = []
    for expert in range(experts.num_experts):
        index = torch.full((len(hidden_states), 1), expert, device=hidden_states.device)
        assignment = ExpertAssignment(index, torch.ones_like(index, dtype=hidden_states.dtype), experts.num_experts)
        outputs.append(F.normalize(experts(hidden_states, assignment).float(), dim=-1))
    stacked = torch.stack(outputs)  # (E, T, d)
    return (torch.einsum("etd,ftd->ef", stacked, stacked) / len(hidden_states)).cpu()


@torch.no_grad()
def expert_similarity(model: Any, batch: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Return [`weight_similarity`] and [`output_similarity`] of every MoE layer, as `weights` and `outputs`.

    Args:
        batch: keyword arguments of a forward pass; its real tokens are the ones compared on.
    """
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: MoELayer, args: tuple[torch.Tensor, ...]) -> None:
        seen[layer.layer_idx] = args[0].flatten(0, 1)

    handles = [layer.register_forward_pre_hook(keep) for layer in model.moe_layers().values()]
    try:
        routing = model.eval()(**batch, output_routing=True).routing
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for index, layer in model.moe_layers().items():
        tokens = seen[index][routing.tokens("token_mask", seen[index].device)]
        result[index] = {"weights": weight_similarity(layer), "outputs": output_similarity(layer, tokens)}
    return result


def mean_similarity(matrix: torch.Tensor) -> float:
    """Return the mean of a similarity matrix off its diagonal."""
    experts = len(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / max(experts * (experts - 1), 1)).item()


def modality_divergence(statistics: RoutingStatistics) -> dict[int, float]:
    """Return, by layer, the Jensen-Shannon divergence in bits of the expert shares of the modalities that were seen.

    0 where all use the experts alike; for two modalities 1 where they share none. Modalities count alike.
    """
    result = {}
    for layer in sorted(statistics.tables):
        filled = statistics.tables[layer][:, :-1].sum(-1) > 0
        shares = statistics.shares(layer)[filled].double()
        entropies = torch.special.entr(shares).sum(-1)
        mixture = torch.special.entr(shares.mean(0)).sum()
        result[layer] = ((mixture - entropies.mean()) / torch.log(torch.tensor(2.0))).clamp(min=0).item()
    return result


@torch.no_grad()
def shuffle_test(
    model: Any, batches: Iterable[dict[str, torch.Tensor]], shuffles: int = 3, seed: int = 0
) -> dict[str, float]:
    """Return the mean language loss with the routers as they are, and with their columns permuted.

    Args:
        batches: keyword arguments of forward passes, with labels.
        shuffles: permutations per layer that are averaged; none leaves an expert in its place.
        seed: of the permutations.

    Returns:
        `loss`, `shuffled_loss` and `change`, their relative difference.
    """
    batches = list(batches)
    loss = _mean_loss(model, batches)
    generator = torch.Generator().manual_seed(seed)
    shuffled = 0.0
    for _ in range(shuffles):
        handles = []
        for layer in model.moe_layers().values():
            experts = layer.spec.num_experts
            # A cycle through a random order moves every expert.
            order = torch.randperm(experts, generator=generator)
            target = torch.empty(experts + 1, dtype=torch.long)
            target[order], target[experts] = order.roll(1), experts
            handles.append(layer.gate.register_forward_hook(_exchange(target)))
        try:
            shuffled += _mean_loss(model, batches) / shuffles
        finally:
            for handle in handles:
                handle.remove()
    return {"loss": loss, "shuffled_loss": shuffled, "change": shuffled / loss - 1.0}


def _exchange(target: torch.Tensor) -> Any:
    def hook(gate: Any, args: tuple[torch.Tensor, RoutingContext], decision: Any) -> Any:
        if not isinstance(decision, ExpertAssignment):
            raise ValueError(f"The shuffle test needs a router that assigns experts, not {type(decision).__name__}.")
        decision.expert_index = target.to(decision.expert_index.device)[decision.expert_index]
        return decision

    return hook


def _mean_loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    total, labels = 0.0, 0
    for batch in batches:
        outputs = model.eval()(**batch)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += (outputs.loss - outputs.aux_loss).item() * count
        labels += count
    return total / max(labels, 1)


def _bank(layer: MoELayer) -> FfnExperts:
    if not isinstance(layer.experts, FfnExperts):
        raise ValueError(
            f"Layer {layer.layer_idx}: similarities are between feed-forwards of one bank, not "
            f"{type(layer.experts).__name__}."
        )
    return layer.experts
