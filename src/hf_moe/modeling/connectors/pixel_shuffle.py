"""Pixel-shuffle connector: trades patches for channels, so that an image takes fewer tokens and loses nothing.

Each `scale_factor` x `scale_factor` block of the square patch grid becomes one token of `scale_factor^2 * C` channels
(row by row within the block), and linear layers map it to the decoder's width. One layer without bias is SmolVLM's.

Sources: Idefics3 (Building and better understanding vision-language models, arXiv:2408.12637); SmolVLM,
arXiv:2504.05299.
"""

import math

import torch

from ...configuration.checks import PositiveInt
from ..linear_chain import initialize_linears, linear_chain
from ..registry import register_connector
from ..routing import Connector


@register_connector("pixel_shuffle")
class PixelShuffleConnector(Connector):
    """Space-to-depth, then `num_layers` linear layers with an activation between them.

    Args:
        feature_size: C, the width of the tower's features.
        hidden_size: d, the width of the decoder.
        scale_factor: side of a block, >= 1.
        num_layers: number of linear layers, >= 1.
        act: activation between them, as in Transformers' `ACT2FN`.
        bias: whether the linear layers have biases.

    Raises:
        ValueError: if `act` is unknown, or the patches do not form a square whose side `scale_factor` divides.
    """

    def __init__(
        self,
        feature_size: int,
        hidden_size: int,
        *,
        scale_factor: PositiveInt = 2,
        num_layers: PositiveInt = 1,
        act: str = "gelu",
        bias: bool = False,
    ):
        super().__init__(feature_size, hidden_size)
        self.scale_factor = scale_factor
        widths = [feature_size * scale_factor**2] + [hidden_size] * num_layers
        self.layers = linear_chain(widths, act, bias)

    def initialize(self, std: float) -> None:
        initialize_linears(self.layers, std)

    def num_tokens(self, num_patches: int) -> int:
        side = math.isqrt(num_patches)
        if side * side != num_patches or side % self.scale_factor:
            raise ValueError(
                f"Connector 'pixel_shuffle' with scale_factor={self.scale_factor} needs a square grid of patches "
                f"whose side is a multiple of {self.scale_factor}; got {num_patches} patches. Change scale_factor "
                "or the image size."
            )
        return (side // self.scale_factor) ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        images, patches, width = features.shape
        tokens, block = self.num_tokens(patches), self.scale_factor
        side = math.isqrt(patches) // block
        blocks = features.reshape(images, side, block, side, block, width).transpose(2, 3)
        return self.layers(blocks.reshape(images, tokens, block * block * width))
