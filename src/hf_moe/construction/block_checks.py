"""Whether a MoE layer, or one of its experts, computes what the host's block or feed-forward did."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..modeling.block import Block
from ..modeling.decisions import ExpertAssignment
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.experts.ffn import FfnExperts
from ..modeling.host_layers import read_ffn
from ..modeling.layer_spec import MoELayerSpec
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.routing_context import ACTIVE_CONTEXT, RoutingContext
from ..modeling.shared_experts import SharedExperts
from .expert_sources import feed_forward_state
from .step_zero import tolerance


# What is compared: the host's module, and what takes its place.
Pair = tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]


@torch.no_grad()
def check_expert(model: HfMoeForConditionalGeneration, layer: Block, ffn: nn.Module) -> None:
    """Refuse a dense feed-forward that is more than its projections and activation: no expert computes what it does.

    Raises:
        ValueError: with the difference, on random hidden states.
    """
    host = read_ffn(ffn)
    assert host.layout is not None, "of a dense feed-forward"
    spec = replace(layer.spec, num_experts=1, expert_intermediate_size=host.intermediate_size, banks=())
    weight = next(ffn.parameters())
    with torch.device(weight.device):
        expert = FfnExperts(model.config, spec).to(weight.dtype).eval()
    expert.take([feed_forward_state(ffn)])

    def ours(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)  # (T, d)
        index = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        assignment = ExpertAssignment(index, torch.ones_like(index, dtype=rows.dtype), num_experts=1)
        return expert(rows, assignment).view(*hidden_states.shape[:-1], -1)

    with evaluation_mode(ffn):
        found = [_differences(ffn, ours, spec.hidden_size, weight, scale) for scale in (1.0, _large(weight))]
    difference = torch.cat(found).max().item()
    if not difference <= tolerance(weight.dtype):
        raise ValueError(
            f"{type(ffn).__name__} cannot become a MoE layer: an expert that holds the feed-forward of layer "
            f"{spec.layer_idx} differs from it by {difference:.1e}; it does more than its projections and activation."
        )


@torch.no_grad()
def check_block(layer: Block, block: nn.Module, branches: Mapping[str, str] | None = None) -> None:
    """Refuse a host's MoE block that computes something else than the layer which has taken over its weights.

    Args:
        branches: paths of the parts that compute alone, in the block and in the layer, see [`BlockReading`]. They are
            compared on large hidden states too, where a clamp shows; a gate's scores would only tie there.

    Raises:
        ValueError: with the difference, on random hidden states.
    """
    weight = next(block.parameters())
    width = layer.spec.hidden_size
    with evaluation_mode(block), evaluation_mode(layer):
        pair: Pair = (_half_images(block), _half_images(layer)) if layer.spec.banks else (block, layer)
        whole = _differences(*pair, width, weight)  # (16,)
        # In low precision hosts round the logits of their gates, which ours do not: some tokens find other experts.
        most = whole.max() if weight.dtype == torch.float32 else whole.quantile(0.75)
        differences = {"the block": most.item()}
        for path, own in (branches or {}).items():
            theirs, ours = block.get_submodule(path), layer.get_submodule(own)
            if isinstance(ours, SharedExperts):
                pair = theirs, ours.feed_forward  # without the gate on its output
            else:
                pair = _in_turn(theirs, layer.spec), _in_turn(ours, layer.spec)
            differences[path] = _differences(*pair, width, weight, _large(weight)).max().item()
    part, difference = max(differences.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not difference <= tolerance(weight.dtype):
        raise ValueError(
            f"{type(block).__name__} cannot be adopted: the MoE layer that holds the weights of layer "
            f"{layer.layer_idx} differs from it by {difference:.1e} in {part}; it does more than a top-k gate and "
            "gated experts do. Choose another decoder."
        )


def _half_images(block: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Return a block with a bank for text and one for vision as it runs where every other token is of an image."""

    def run(hidden_states: torch.Tensor) -> Any:
        kinds = (torch.arange(hidden_states.shape[1], device=hidden_states.device) % 2)[None]  # (1, S)
        if not isinstance(block, Block):
            return block(hidden_states, kinds)
        token = ACTIVE_CONTEXT.set(RoutingContext(kinds, torch.ones_like(kinds, dtype=torch.bool)))
        try:
            return block(hidden_states)
        finally:
            ACTIVE_CONTEXT.reset(token)

    return run


def _in_turn(experts: nn.Module, spec: MoELayerSpec) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a stack of experts as it runs where tokens go to them in turn, with equal weights."""

    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)  # (T, d)
        index = torch.arange(len(rows) * spec.num_experts_per_tok, device=rows.device).view(len(rows), -1)
        weight = torch.full_like(index, 1.0 / spec.num_experts_per_tok, dtype=rows.dtype)
        return experts(rows, index % experts.down_proj.shape[0], weight).view_as(hidden_states)

    return run


def _large(weight: torch.Tensor) -> float:
    """Return by how much hidden states are scaled to reach a clamp; float16 has no room for their products."""
    return 1.0 if weight.dtype == torch.float16 else 100.0


def _differences(
    theirs: Callable[..., Any], ours: Callable[..., Any], width: int, weight: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Return the largest difference of two functions' outputs for each of 16 random tokens, (16,).

    It is relative to the token's largest output: two kernels round in proportion to what they sum.
    """
    hidden = scale * torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0)).to(weight)
    outputs = (theirs(hidden), ours(hidden))
    # A block may return its logits too, and its tokens as one row each.
    expected, found = (
        (output[0] if isinstance(output, tuple) else output).float().view(hidden.shape[1], -1) for output in outputs
    )
    largest = expected.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - expected).abs().amax(-1) / largest
