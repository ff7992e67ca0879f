"""What the targets in a layer know while it runs."""

from typing import Any

import torch
from torch import nn

from ..modeling.decisions import SlotMixture
from ..modeling.routing_context import ACTIVE_CONTEXT, MODALITIES, RoutingContext
from .low_rank import SharedAssignment


def are_tokens(x: torch.Tensor, shape: torch.Size) -> bool:
    """Whether `x` (..., d) can be the tokens of that shape in their order: the same, or all rows in one.

    Dimensions of size 1 move no token; multi-head latent attention has one in place of heads. Windows of a tower have
    as many tokens, in another order.
    """
    found = x.shape[:-1]
    if found == shape or found == (shape.numel(),):
        return True
    return [size for size in found if size != 1] == [size for size in shape if size != 1]


def unknown_tokens(hidden_states: torch.Tensor) -> RoutingContext:
    """Return the context of hidden states ((B,) S, d) of which the model tells nothing: all are real, of unknown
    modality and rows.
    """
    context = RoutingContext.all_text(hidden_states.reshape(-1, *hidden_states.shape[-2:]))
    context.modality_ids, context.condition_ids = _refuse_modality, None
    return context


def _refuse_modality() -> torch.Tensor:
    raise ValueError(
        "This router reads the modality of the tokens, which is known only in layers that read a model's input_ids; "
        "those of a vision tower or encoder have but one. Choose a router that reads hidden states alone, such as "
        "'top_k', or other target_modules."
    )


class LayerCall:
    """One call of a layer with targets in it.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, d)`): what enters the layer.
        encoder_hidden_states: what its cross-attention reads, if it has one.
        knows_tokens: whether the context would be about the tokens of this layer.
    """

    def __init__(
        self,
        context: RoutingContext | None,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any,
        knows_tokens: bool,
    ):
        self.context = context if knows_tokens else None
        self.hidden_states = hidden_states
        self.shape = hidden_states.shape[:-1]  # of the tokens
        self.encoder_hidden_states = encoder_hidden_states
        self.knows_tokens = knows_tokens
        # (adapter, target that has the router) -> the decision that targets in this layer share.
        self.shared: dict[tuple[str, nn.Module], SharedAssignment | SlotMixture] = {}
        if self.context is not None and self.context.token_mask.shape[1] == 0:
            # The number of patches of images, one a row, shows in what enters the first layer of an encoder.
            if hidden_states.dim() == 3 and len(hidden_states) == len(self.context.token_mask):
                seen = RoutingContext.all_text(hidden_states)
                self.context.token_mask = seen.token_mask
                self.context.modality_ids = seen.modality_ids + MODALITIES.index("image")

    def of(self, adapter: str) -> RoutingContext:
        """Return the context of an adapter."""
        assert self.context is not None
        return self.context.of(adapter)

    def check_told(self, router: str) -> None:
        """Refuse a router that needs what only the call of the model tells, where something inside was called."""
        if self.knows_tokens and self.context is None:
            raise RuntimeError(
                f"{router} needs to know the tokens of the call, and the layer was called without them: call the "
                "model or the backbone below its head, with input_ids, inputs_embeds or pixel_values and no mask of "
                "the pixels, or choose a router that decides token by token in every layer."
            )

    def tells_of(self, x: torch.Tensor) -> bool:
        """Whether the context is about the tokens of `x` (..., in), in their order."""
        return self.context is not None and are_tokens(x, self.context.token_mask.shape)

    def is_entered_by(self, x: torch.Tensor) -> bool:
        """Whether `x` (..., in) are the tokens that enter the layer."""
        return x is not self.encoder_hidden_states and are_tokens(x, self.shape)


def active_call() -> LayerCall | None:
    """Return the call of the layer with targets that is running, if one is."""
    context = ACTIVE_CONTEXT.get()
    return None if context is None else context.layer_call
