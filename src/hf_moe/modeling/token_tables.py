"""Routers that look a token up in a table, and which row of it is a token's.

    text token                      its id
    token of another modality       V + (m - 1) C + c        m = 1 image, 2 video, 3 audio

V is the size of the vocabulary. These tokens have no id of their own: all of a modality share a row (C = 1), or c is
the nearest, by cosine, of C centroids of what enters the decoder in their place, the projected features. An id that
joined the vocabulary after the table was made takes the row of its remainder.

Tables and centroids are buffers. `construction.token_tables.fit_token_tables` computes them from data.
"""

import torch
from transformers import initialization as init

from ..configuration.configuration_hf_moe import MODALITIES
from .layer_spec import MoELayerSpec
from .routing import Router
from .routing_context import RoutingContext


class TokenTableRouter(Router):
    """Base of the routers with a row for every token.

    Args:
        spec: facts of the layer, whose tokens have ids.
        num_text_rows: V; the size of the vocabulary when `None`.
        codebook_size: C.

    Raises:
        ValueError: if the tokens of the layer have no ids; in `forward`, if the call has no `input_ids`, or C > 1 and
            the model does not tell what enters its decoder.
    """

    reads = frozenset({"input_ids", "modality"})

    def __init__(self, spec: MoELayerSpec, num_text_rows: int | None, codebook_size: int):
        super().__init__(spec)
        if spec.vocab_size is None:
            raise ValueError(
                f"The router {self.mechanism_name!r} of layer {spec.layer_idx} looks tokens up by their ids, and here "
                "they have none, as in a tower: choose a router that reads hidden states, such as 'top_k'."
            )
        self.num_text_rows = num_text_rows or spec.vocab_size
        self.codebook_size = codebook_size
        self.num_rows = self.num_text_rows + (len(MODALITIES) - 1) * codebook_size
        if codebook_size > 1:
            self.register_buffer("centroids", torch.empty(codebook_size, spec.hidden_size, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        """Fill the centroids: directions at random, a fixed partition that is as good as any before there are data."""
        if self.codebook_size > 1:
            init.normal_(self.centroids)

    def seeded(self, seed: int) -> torch.Generator:
        """Return the generator of a layer's draws."""
        return torch.Generator().manual_seed(1000 * seed + self.spec.layer_idx)

    def fit(self, counts: torch.Tensor) -> None:
        """Make the table for tokens of which row r occurs `counts[r]` times, (R,)."""
        raise NotImplementedError(f"{type(self).__name__} must define fit(counts).")

    def text_rows(self, context: RoutingContext) -> torch.Tensor:
        """Return the rows of tokens of text, (B, S), by the ids alone."""
        return self.input_ids(context) % self.num_text_rows

    def rows(self, context: RoutingContext, device: torch.device) -> torch.Tensor:
        """Return the row of every token, (T,)."""
        text = self.text_rows(context).reshape(-1).to(device)
        modality = context.tokens("modality_ids", device)
        codes: torch.Tensor | int = 0
        if self.codebook_size > 1:
            codes = (self.embeddings(context).to(device) @ self.centroids.T).argmax(-1)  # (T,)
        return torch.where(modality == 0, text, self.num_text_rows + (modality - 1) * self.codebook_size + codes)

    def input_ids(self, context: RoutingContext) -> torch.Tensor:
        """Return the ids of the tokens, (B, S)."""
        if context.input_ids is None:
            raise ValueError(
                f"The router {self.mechanism_name!r} of layer {self.spec.layer_idx} looks tokens up by their ids: "
                "call the model with input_ids, not inputs_embeds, or choose a router that reads hidden states, such "
                "as 'top_k'."
            )
        return context.input_ids

    def embeddings(self, context: RoutingContext) -> torch.Tensor:
        """Return what enters the decoder, (T, d) float32."""
        if context.embeddings is None:
            raise ValueError(
                f"codebook_size={self.codebook_size} of the router {self.mechanism_name!r} is for images among the "
                "embeddings that enter the decoder, which models without a tower and LoRA experts do not tell: set "
                "codebook_size=1, one row for each modality."
            )
        return context.embeddings.flatten(0, 1).float()
