"""MLP connector: every patch feature becomes one token of the decoder.

    y = W_n act(... act(W_1 norm(pool(x))))

Two layers with GELU are LLaVA-1.5's (Improved Baselines with Visual Instruction Tuning, arXiv:2310.03744).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...configuration.checks import PositiveInt
from ..linear_chain import initialize_linears, linear_chain
from ..registry import register_connector
from ..routing import Connector


@register_connector("mlp")
class MlpConnector(Connector):
    """`num_layers` linear layers with an activation between them.

    Args:
        feature_size: C, the width of the tower's features.
        hidden_size: d, the width of the decoder.
        num_layers: number of linear layers, >= 1; one is LLaVA's plain projection.
        act: activation between them, as in Transformers' `ACT2FN`.
        norm: apply a LayerNorm to the features first.
        pool: average `pool` x `pool` neighbouring patches of a square grid into one token.

    Raises:
        ValueError: if `act` is unknown; if, with `pool` > 1, the patches do not form a square whose side `pool`
            divides.
    """

    def __init__(
        self,
        feature_size: int,
        hidden_size: int,
        *,
        num_layers: PositiveInt = 2,
        act: str = "gelu",
        norm: bool = False,
        pool: PositiveInt = 1,
    ):
        super().__init__(feature_size, hidden_size)
        self.pool = pool
        self.norm = nn.LayerNorm(feature_size) if norm else None
        self.layers = linear_chain([feature_size] + [hidden_size] * num_layers, act)

    def initialize(self, std: float) -> None:
        if self.norm is not None:
            init.ones_(self.norm.weight)
            init.zeros_(self.norm.bias)
        initialize_linears(self.layers, std)

    def num_tokens(self, num_patches: int) -> int:
        if self.pool == 1:
            return num_patches
        side = math.isqrt(num_patches)
        if side * side != num_patches or side % self.pool:
            raise ValueError(
                f"Connector 'mlp' with pool={self.pool} needs a square grid of patches whose side is a multiple of "
                f"{self.pool}; got {num_patches} patches. Change pool or the image size."
            )
        return (side // self.pool) ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        images, patches, width = features.shape
        self.num_tokens(patches)
        if self.pool > 1:
            side = math.isqrt(patches)
            grid = features.transpose(1, 2).reshape(images, width, side, side)
            features = F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)  # (N, P', C)
        if self.norm is not None:
            features = self.norm(features)
        return self.layers(features)
