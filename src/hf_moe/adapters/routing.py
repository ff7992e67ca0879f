"""How the routing context enters a model that knows nothing of it, and leaves it again.

One hook on the root of the model builds the context and passes it down as a keyword argument; the same hook stands on
the backbone below a head, for callers that need no head. The class of every layer
with a target is swapped for a subclass of the same name that takes the argument and keeps it, with the hidden state
that enters the layer, in a context variable while the host's own forward runs. As an argument of the layer the context
survives every kind of recomputation; hooks on layers would not run again in one. Where a model drops the argument on
the way, the layer's call takes it from the root's own variable, before a recomputation records the arguments.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.routing import MODALITIES, Decision, RoutingContext
from .conditions import conditions_of_rows, conditions_read, take_conditions
from .documents import packed_documents
from .low_rank import ExpertSlots, MixedSlots
from .memory import PooledState, cache_of, cached_tokens, first_column, foreign_state, keep_state, past_state


def are_tokens(x: torch.Tensor, shape: torch.Size) -> bool:
    """Whether `x` (..., d) can be the tokens of that shape in their order: the same, or all rows in one.

    Windows of a tower have as many tokens, in another order.
    """
    return x.shape[:-1] == shape or x.shape[:-1] == (shape.numel(),)


class AdapterContext:
    """What one forward of the root passes to its layers.

    A plain class on purpose, see [`RoutingContext`].

    Args:
        tokens: what the routers may know of the tokens.
        cache: the key-value cache of the call, with what routers remember of its tokens.
        hides_padding: the attention mask does not tell which tokens are padding.
        foreign_state: what the model keeps of earlier tokens in place of a cache, if it does.
        documents (`torch.Tensor` of shape `(B, S)`, *optional*): which of several in its row a token belongs to.
    """

    # The root's variable and what it held before, while its forward runs.
    token: Token | None = None
    # What was called.
    root: nn.Module | None = None

    def __init__(
        self,
        tokens: RoutingContext,
        cache: Cache | None = None,
        hides_padding: bool = False,
        documents: torch.Tensor | None = None,
        foreign_state: Any = None,
    ):
        self.tokens = tokens
        self.past = past_state(cache)
        self.cached_tokens = cached_tokens(cache)
        self.hides_padding = hides_padding
        self.documents = documents
        self.foreign_state = foreign_state
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
            context.carry = {
                "past": self.past.get(adapter_name, {}),
                "cached_tokens": self.cached_tokens,
                "hides_padding": self.hides_padding,
                "documents": self.documents,
                "foreign_state": self.foreign_state,
                "pooled": {},
            }
        return self._of[adapter_name]

    @property
    def decisions(self) -> dict[str, dict[int, Decision]]:
        """Adapter -> number of the router -> decision."""
        return {name: context.decisions for name, context in self._of.items() if context.decisions}

    @property
    def pooled(self) -> PooledState:
        """What the routers remember after this forward, as in `past`."""
        return {name: context.carry["pooled"] for name, context in self._of.items() if context.carry["pooled"]}


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
        # (adapter, number of the router) -> the decision that targets in this layer share.
        self.shared: dict[tuple[str, int], ExpertSlots | MixedSlots] = {}

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


ACTIVE_LAYER: ContextVar[LayerRun | None] = ContextVar("hf_moe_active_layer", default=None)
_ROOT_CONTEXT: ContextVar[AdapterContext | None] = ContextVar("hf_moe_root_context", default=None)

# Name of the experts behind a whole layer, a child of it. PEFT passes over names with its own prefix when it unloads.
OUTPUT_EXPERTS = "output_experts"


@functools.cache
def adapted_layer_class(host_class: Any, knows_tokens: bool) -> Any:
    """Return the subclass of a layer's class that takes `moe_lora_context`, and runs the experts behind the layer.

    Args:
        host_class: class of the layer; its name is kept, by which device maps and FSDP wrapping policies find it.
        knows_tokens: whether the root's context is about the tokens of this layer.
    """

    names = list(inspect.signature(host_class.forward).parameters)[1:]
    place = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "moe_lora_context" not in kwargs:
            kwargs["moe_lora_context"] = _ROOT_CONTEXT.get()
        return host_class.__call__(self, *args, **kwargs)

    def forward(self: Any, *args: Any, moe_lora_context: AdapterContext | None = None, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        context = moe_lora_context if knows_tokens else None
        if context is not None:
            context.enter(hidden_states)
        positional = args[place] if place is not None and place < len(args) else None
        run = LayerRun(hidden_states, context, kwargs.get("encoder_hidden_states", positional), knows_tokens)
        token = ACTIVE_LAYER.set(run)
        try:
            output = host_class.forward(self, *args, **kwargs)
            experts = self._modules.get(OUTPUT_EXPERTS)
            if experts is None:
                return output
            return (experts(output[0]), *output[1:]) if isinstance(output, tuple) else experts(output)
        finally:
            ACTIVE_LAYER.reset(token)

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
        if "__reduce_ex__" in vars(host_class):  # a layer of our own models, itself such a subclass
            create, args, state = host_class.__reduce_ex__(self, protocol)
        else:
            create, args, state = host_class.__new__, (host_class,), self.__dict__
        return _new_adapted_layer, (knows_tokens, create, args), state

    body = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": host_class.__module__,
        "moe_lora_host_class": host_class,
        "moe_lora_knows_tokens": knows_tokens,
    }
    # A layer of another kind may be called again in a recomputation, when the root has returned.
    if issubclass(host_class, GradientCheckpointingLayer):
        body["__call__"] = __call__
    return type(host_class.__name__, (host_class,), body)


def _new_adapted_layer(knows_tokens: bool, create: Any, args: tuple) -> nn.Module:
    layer = create(*args)
    layer.__class__ = adapted_layer_class(type(layer), knows_tokens)  # type: ignore[arg-type]
    return layer


def root_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of the root by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def real_tokens(model: PreTrainedModel, inputs: dict[str, Any], length: int) -> torch.Tensor | None:
    """Return which of the last `length` tokens are no padding, (B, length) bool; `None` if the mask does not tell."""
    mask, cache = inputs.get("attention_mask"), cache_of(inputs)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # of the past as well, and of free places behind
        start = first_column(inputs, mask.shape[1], length)
        return mask[:, start : start + length].bool()
    if cache is None or not cache.is_compileable:
        return None
    # `generate` makes the masks for a cache of fixed size itself, one for each kind of layers: (B, 1, S, cache).
    if isinstance(mask, dict):
        mask = mask.get(model.config.get_text_config().layer_types[0])
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    # All tokens but padding attend to themselves.
    own = mask[:, 0].diagonal(
        cached_tokens(cache) - int(cache.get_mask_sizes(length, 0)[1]), dim1=-2, dim2=-1
    )  # (B, S)
    return own if own.dtype is torch.bool else own == 0


def token_context(model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext | None:
    """Return what the inputs of the root tell of its tokens; `None` where it got none."""
    given = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if given is None:
        return None
    names = ("input_ids", "inputs_embeds", "attention_mask", "mm_token_type_ids", "condition_ids", "routing_overrides")
    shape, device = given.shape[:2], given.device
    token_mask = real_tokens(model, inputs, shape[1])
    own = getattr(model.base_model, "routing_context", None)
    if own is not None:  # one of our own models, which knows best
        context = own(**{name: inputs.get(name) for name in names})
        context.token_mask = context.token_mask if token_mask is None else token_mask
        return context
    if token_mask is None:
        token_mask = torch.ones(shape, dtype=torch.bool, device=device)
    modality_ids = inputs.get("mm_token_type_ids")
    if modality_ids is None:
        modality_ids = torch.zeros(shape, dtype=torch.long, device=device)
        for modality, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"), start=1):
            token_id = getattr(model.config, name, None)
            if token_id is not None and inputs.get("input_ids") is not None:
                modality_ids = modality_ids.masked_fill(inputs["input_ids"] == token_id, modality)
    return RoutingContext(modality_ids[:, -shape[1] :].long(), token_mask, inputs.get("input_ids"))


def pass_context(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before the forward of the root, or of its backbone: pass the routing context on to the decoder layers."""
    if is_inside() or not any(getattr(module, "moe_lora_knows_tokens", False) for module in model.modules()):
        return None
    kwargs = dict(kwargs)
    read = conditions_read(model)
    given = take_conditions(model, kwargs, read)
    inputs = {**root_inputs(model, args, kwargs), "condition_ids": given or None}
    context = image_context if model.main_input_name == "pixel_values" else text_context
    passed = context(model, inputs, partial(conditions_of_rows, given, read))
    if passed is None:
        return args, kwargs
    passed.root = model
    passed.token = _ROOT_CONTEXT.set(passed)
    return args, {**kwargs, "moe_lora_context": passed}


def text_context(
    model: PreTrainedModel, inputs: dict[str, Any], conditions: Callable[[int], dict[str, torch.Tensor]]
) -> AdapterContext | None:
    """Return what a model that reads token ids tells its layers; `None` where it got none."""
    tokens = token_context(model, inputs)
    if tokens is None:
        return None
    rows, length = tokens.token_mask.shape
    tokens.condition_ids = conditions(rows)
    hides_padding = inputs.get("attention_mask") is not None and real_tokens(model, inputs, length) is None
    cache = cache_of(inputs)
    documents = None if cached_tokens(cache) else packed_documents(inputs, tokens.token_mask.shape)
    return AdapterContext(tokens, cache, hides_padding, documents, foreign_state(inputs))


def image_context(
    model: PreTrainedModel, inputs: dict[str, Any], conditions: Callable[[int], dict[str, torch.Tensor]]
) -> ImageContext | None:
    """Return what a vision encoder tells its layers; `None` where a mask says that some patches are padding."""
    pixels = inputs.get("pixel_values")
    if pixels is None or any(inputs.get(name) is not None for name in ("pixel_mask", "pixel_attention_mask")):
        return None
    return ImageContext(len(pixels), conditions(len(pixels)))


def context_of_call(model: nn.Module, kwargs: dict[str, Any]) -> AdapterContext | None:
    """Return the context of a forward that has returned, if `model` was called and no model around it."""
    context: AdapterContext | None = kwargs.get("moe_lora_context")
    return context if context is not None and context.root is model else None


def is_inside() -> bool:
    """Whether the forward of a model around this one is running."""
    return _ROOT_CONTEXT.get() is not None


def remember(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook after the root's forward, or its failure: leave what the routers have pooled with the key-value cache."""
    context = context_of_call(model, kwargs)
    if context is None:
        return
    if context.token is not None:
        _ROOT_CONTEXT.reset(context.token)
        context.token = None
    cache = cache_of(output) if isinstance(output, dict | tuple) else None
    # A host fills a cache that it was given, whether or not it returns it.
    keep_state(cache_of(root_inputs(model, args, kwargs)) if cache is None else cache, context.pooled)
