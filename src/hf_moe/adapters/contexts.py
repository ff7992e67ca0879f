"""What is known in one forward of a model, and in one call of a layer, about the tokens."""

import copy
from typing import Any

import torch
from torch import nn

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.decisions import Decision, SlotMixture
from ..modeling.layer_spec import Site
from ..modeling.routing_context import RoutingContext, TraceableVariable
from .low_rank import SharedAssignment


def are_tokens(x: torch.Tensor, shape: torch.Size) -> bool:
    """Whether `x` (..., d) can be the tokens of that shape in their order: the same, or all rows in one.

    Dimensions of size 1 move no token; multi-head latent attention has one in place of heads. Windows of a tower have
    as many tokens, in another order.
    """
    found = x.shape[:-1]
    return found == shape or found == (shape.numel(),) or _wider(found) == _wider(shape)


def _wider(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


class AdapterContext:
    """What one forward of the root passes to its layers.

    A plain class on purpose, see [`RoutingContext`].

    Args:
        tokens: what the routers may know of the tokens.
    """

    # What was called.
    root: nn.Module | None = None

    def __init__(self, tokens: RoutingContext):
        self.tokens = tokens
        self._of: dict[str, RoutingContext] = {}

    def enter(self, hidden_states: torch.Tensor) -> None:
        """Take note of what enters a layer."""

    def tells_of(self, hidden_states: torch.Tensor) -> bool:
        """Whether the tokens are those of some hidden states (..., d), in their order."""
        return are_tokens(hidden_states, self.tokens.token_mask.shape)

    def of(self, adapter_name: str) -> RoutingContext:
        """Return the context of one adapter: what is known of the tokens, with decisions and memory of its own."""
        if adapter_name not in self._of:
            context = self._of[adapter_name] = copy.copy(self.tokens)
            # A recomputed layer overwrites its own entries.
            context.decisions = {}
            context.carry = {}
            context.memory = self.tokens.memory.of(adapter_name)
        return self._of[adapter_name]

    @property
    def decisions(self) -> dict[str, dict[Site, Decision]]:
        """Adapter -> number of the router -> decision."""
        return {name: context.decisions for name, context in self._of.items() if context.decisions}


class ImageContext(AdapterContext):
    """What one forward of a vision encoder passes to its layers: one image per row, whose patches are all real.

    Args:
        rows: B.
        conditions: of the rows.
    """

    def __init__(self, rows: int, conditions: dict[str, torch.Tensor]):
        # How many patches there are shows in the first layer.
        nothing = torch.zeros(rows, 0, dtype=torch.long)
        super().__init__(RoutingContext(nothing, nothing.bool(), condition_ids=conditions))

    def enter(self, hidden_states: torch.Tensor) -> None:
        known = self.tokens
        if not known.token_mask.numel() and hidden_states.dim() == 3 and len(hidden_states) == len(known.token_mask):
            context = RoutingContext.all_text(hidden_states)
            known.token_mask = context.token_mask
            known.modality_ids = context.modality_ids + MODALITIES.index("image")


class UnknownModality(RoutingContext):
    """The context of tokens whose modality nothing tells: routers that read it refuse the call.

    Args:
        known: what else is known.
        reason: why it is unknown, and what to do.
    """

    def __init__(self, known: RoutingContext, reason: str):
        self.reason = reason
        ids = known.token_mask.long()
        super().__init__(ids, known.token_mask)
        fields = ("input_ids", "condition_ids", "progress", "overrides", "memory", "inputs")
        vars(self).update({name: getattr(known, name) for name in fields})

    @property
    def modality_ids(self) -> torch.Tensor:
        raise ValueError(f"This router reads the modality of the tokens, which is unknown. {self.reason}")

    @modality_ids.setter
    def modality_ids(self, value: torch.Tensor) -> None:
        pass


class TokenlessContext(RoutingContext):
    """The context of a layer whose model tells nothing of its tokens: all are real, of no modality or condition.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, d)` or `(S, d)`).
    """

    def __init__(self, hidden_states: torch.Tensor):
        text = RoutingContext.all_text(hidden_states.reshape(-1, *hidden_states.shape[-2:]))
        super().__init__(text.modality_ids, text.token_mask)

    @property
    def modality_ids(self) -> torch.Tensor:
        raise ValueError(
            "This router reads the modality of the tokens, which is known only in layers that read a model's "
            "input_ids; those of a vision tower or encoder have but one. Choose a router that reads hidden states "
            "alone, such as 'top_k', or other target_modules."
        )

    @modality_ids.setter
    def modality_ids(self, value: torch.Tensor) -> None:
        pass

    @property
    def condition_ids(self) -> dict[str, torch.Tensor]:
        raise ValueError(
            "This router reads a condition of the rows, and a target's tokens are not the rows of the call, one "
            "sequence or image each: it lies in the tower of a larger model, in an encoder-decoder, or in a layer "
            "that cuts its input into windows. Choose a router that reads hidden states alone, such as 'top_k', or "
            "other target_modules."
        )

    @condition_ids.setter
    def condition_ids(self, value: dict[str, torch.Tensor]) -> None:
        pass


class LayerRun:
    """One call of a layer with targets in it.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, d)`): what enters the layer.
        context: what the root passed down, if it did.
        encoder_hidden_states: what its cross-attention reads, if it has one.
        knows_tokens: whether the root's context would be about the tokens of this layer.
    """

    def __init__(
        self,
        hidden_states: torch.Tensor,
        context: AdapterContext | None,
        encoder_hidden_states: Any = None,
        knows_tokens: bool = False,
    ):
        self.hidden_states = hidden_states
        self.context = context
        self.encoder_hidden_states = encoder_hidden_states
        self.knows_tokens = knows_tokens
        # (adapter, target that has the router) -> the decision that targets in this layer share.
        self.shared: dict[tuple[str, nn.Module], SharedAssignment | SlotMixture] = {}

    def check_told(self, router: str) -> None:
        """Refuse a router that needs what only the call of the model tells, where something inside was called."""
        if self.knows_tokens and self.context is None:
            raise RuntimeError(
                f"{router} needs to know the tokens of the call, and the layer was called without them: call the "
                "model or the backbone below its head, with input_ids, inputs_embeds or pixel_values and no mask of "
                "the pixels, or choose a router that decides token by token in every layer."
            )

    def tells_of(self, x: torch.Tensor) -> bool:
        """Whether `x` (..., in) are the tokens that enter the layer."""
        return x is not self.encoder_hidden_states and are_tokens(x, self.hidden_states.shape[:-1])


ACTIVE_LAYER: TraceableVariable[LayerRun] = TraceableVariable("hf_moe_active_layer")
