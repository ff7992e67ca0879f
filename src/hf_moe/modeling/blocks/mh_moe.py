"""Multi-head mixture of experts: every token is cut into h sub-tokens, and each of them is routed by itself.

    (T, d) -> W_head -> (T * h, d / h) -> router and experts of width d / h -> (T, d) -> W_merge

A token reaches up to h * K experts at the cost of one top-k pass. The shared branch keeps the full width and sees the
tokens as they are. With parity the experts have the width m' and the number E' at which active and total parameters
are those of the plain layer of E experts of width m, W_head and W_merge included:

    m' = m - 2 d / (p K)        E' = h (p E m - 2 d) / (p m')

p is the number of an expert's projections, 3 with a gate and 2 without. m' is rounded
to a multiple of 8. W_head and W_merge start orthogonal, which the papers do not say.

Sources: Multi-Head Mixture-of-Experts, arXiv:2404.15045 (4 heads, no parity: the name `multi_head_moe`);
MH-MoE: Multi-Head Mixture-of-Experts, arXiv:2411.16205 (parity).
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..block import Block, Parts
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing_context import RoutingContext


@register_block("mh_moe")
class MultiHeadMoE(Block):
    """A router and experts of sub-tokens, between two linear maps.

    Args:
        num_heads: h, which must divide d.
        head_layer: whether there is W_head.
        merge_layer: whether there is W_merge.
        parity: derive the number and the width of the experts as above; otherwise they are those of `spec`.

    Raises:
        ValueError: if h does not divide d, parity leaves the experts no width, or the layer has isolated banks, which
            parity cannot resize.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        *,
        num_heads: PositiveInt = 2,
        head_layer: bool = True,
        merge_layer: bool = True,
        parity: bool = True,
    ):
        super().__init__(spec, parts)
        width = spec.hidden_size
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={width} of layer {spec.layer_idx}.")
        self.num_heads = num_heads
        self.head = nn.Linear(width, width, bias=False) if head_layer else nn.Identity()
        self.merge = nn.Linear(width, width, bias=False) if merge_layer else nn.Identity()
        pieces = replace(_at_parity(spec, num_heads) if parity else spec, hidden_size=width // num_heads)
        self.gate = parts.router(pieces)
        self.expert_spec = pieces
        self.experts = parts.experts(pieces)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def initialize(self, std: float) -> None:
        for layer in self.initialized_parts()[1:]:
            init.orthogonal_(layer.weight)

    def initialized_parts(self) -> list[nn.Module]:
        return [self, *(layer for layer in (self.head, self.merge) if isinstance(layer, nn.Linear))]

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        pieces = self.head(tokens).reshape(len(tokens) * self.num_heads, -1)  # (T * h, d / h)
        output, _ = self.route(self.gate, self.experts, pieces, context.split(self.num_heads))
        return self.add_shared(self.merge(output.reshape(tokens.shape)), tokens)


def _at_parity(spec: MoELayerSpec, num_heads: int) -> MoELayerSpec:
    """Return the experts that cost, with W_head and W_merge, what those of `spec` do without."""
    projections = 3 if spec.gated else 2
    maps = 2 * spec.hidden_size / projections  # what both linear maps take of E m
    width = 8 * round((spec.expert_intermediate_size - maps / spec.num_experts_per_tok) / 8)
    if width < 8 or spec.banks:
        raise ValueError(
            f"Layer {spec.layer_idx}: parity=True takes 2 d / (p K) = {maps / spec.num_experts_per_tok:.0f} of "
            f"expert_intermediate_size={spec.expert_intermediate_size} for the linear maps, in layers without banks: "
            "set parity=False, or give wider experts, more slots or no expert_banks."
        )
    experts = round(num_heads * (spec.num_experts * spec.expert_intermediate_size - maps) / width)
    return replace(spec, num_experts=experts, expert_intermediate_size=width)
