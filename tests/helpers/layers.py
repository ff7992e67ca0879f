"""Single MoE layers for the checks of systems: small, in float32, on the eager backend."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from helpers.router_cases import EAGER
from hf_moe import MoeConfig
from hf_moe.modeling.block import Block
from hf_moe.modeling.configured_parts import build_block
from hf_moe.modeling.initialisation import initialize_mechanisms
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, RoutingContext


def make_layer(
    hidden_size: int = 16,
    width: int = 24,
    experts: int = 8,
    slots: int = 2,
    *,
    std: float = 0.3,
    kind: Any = "ffn",
    **moe: Any,
) -> Block:
    """Return a MoE layer with random weights and `experts` of a `kind`; `moe` are other fields of a `MoeConfig`."""
    torch.manual_seed(moe.pop("seed", 0))
    layer = build_block(EAGER, MoeConfig(experts=kind, **moe), MoELayerSpec(1, hidden_size, experts, slots, width))
    initialize_mechanisms(layer, std)
    if layer.shared_expert is not None:
        for parameter in layer.shared_expert.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return layer


def run(layer: Block, hidden_states: torch.Tensor) -> tuple[torch.Tensor, RoutingContext]:
    """Return the layer's output for (B, S, d), and the context of it."""
    context = RoutingContext.all_text(hidden_states)
    token = ACTIVE_CONTEXT.set(context)
    try:
        return layer(hidden_states), context
    finally:
        ACTIVE_CONTEXT.reset(token)


def fitted(layer: Block, batch: Any, steps: int, ends: tuple[nn.Module, nn.Module] | None = None) -> float:
    """Train a layer, with its residual, on batches of inputs and targets; return the mean loss of the last tenth.

    Args:
        batch: returns inputs (T, d) and targets (T, d), or of the widths of the linear maps in `ends`, before and
            after the layer.
    """
    before, after = ends or (nn.Identity(), nn.Identity())
    parameters = [parameter for part in (layer, before, after) for parameter in part.parameters()]
    optimizer, losses = torch.optim.Adam(parameters, lr=3e-3), []
    for _ in range(steps):
        inputs, targets = batch()
        hidden = before(inputs)
        loss = F.mse_loss(after(hidden + layer(hidden[None])[0]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])
