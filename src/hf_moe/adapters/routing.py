"""How the routing context enters a model that knows nothing of it, and leaves it again.

One hook on the root of the model builds the context and passes it down as a keyword argument. The class of every
decoder layer with a target is swapped for a subclass of the same name that takes the argument and keeps it, with the
hidden state that enters the layer, in a context variable while the host's own forward runs. As an argument of the
layer the context survives every kind of recomputation; hooks on layers would not run again in one.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.routing import Decision, Router, RoutingContext
from .low_rank import ExpertSlots, MixedSlots
from .memory import PooledState, keep_state, past_state


class AdapterContext:
    """What one forward of the root passes to its decoder layers.

    A plain class on purpose, see [`RoutingContext`].

    Args:
        tokens: what the routers may know of the tokens.
        cache: the key-value cache of the call, with what routers remember of its tokens.
        hides_padding: the attention mask does not tell which tokens are padding.
    """

    def __init__(self, tokens: RoutingContext, cache: Any = None, hides_padding: bool = False):
        self.tokens = tokens
        self.past = past_state(cache)
        self.cached_tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
        self.hides_padding = hides_padding
        self._of: dict[str, RoutingContext] = {}

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


class TokenlessContext(RoutingContext):
    """The context of a layer whose model tells nothing of its tokens: all are real, and they have no modality.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, d)` or `(S, d)`).
    """

    def __init__(self, hidden_states: torch.Tensor):
        text = RoutingContext.all_text(hidden_states.reshape(-1, *hidden_states.shape[-2:]))
        super().__init__(text.modality_ids, text.token_mask)

    @property
    def modality_ids(self) -> torch.Tensor:
        raise ValueError(
            "This router reads the modality of the tokens, which is known only in the decoder layers of a model that "
            "takes input_ids and passes keyword arguments on to its layers; vision towers and encoders do not. Choose "
            "a router that reads hidden states alone, such as 'top_k', or other target_modules."
        )

    @modality_ids.setter
    def modality_ids(self, value: torch.Tensor) -> None:
        pass


class LayerRun:
    """One call of a decoder layer with targets in it.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, S, d)`): what enters the layer.
        context: what the root passed down, if it did.
    """

    def __init__(self, hidden_states: torch.Tensor, context: AdapterContext | None):
        self.hidden_states = hidden_states
        self.context = context
        # (adapter, number of the router) -> the decision that targets in this layer share.
        self.shared: dict[tuple[str, int], ExpertSlots | MixedSlots] = {}


ACTIVE_LAYER: ContextVar[LayerRun | None] = ContextVar("hf_moe_active_layer", default=None)


@functools.cache
def adapted_layer_class(host_class: Any, knows_tokens: bool) -> Any:
    """Return the subclass of a layer's class that takes `moe_lora_context`.

    Args:
        host_class: class of the layer; its name is kept, by which device maps and FSDP wrapping policies find it.
        knows_tokens: whether the root's context is about the tokens of this layer.
    """

    def forward(self: Any, *args: Any, moe_lora_context: AdapterContext | None = None, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        token = ACTIVE_LAYER.set(LayerRun(hidden_states, moe_lora_context if knows_tokens else None))
        try:
            return host_class.forward(self, *args, **kwargs)
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
    return type(host_class.__name__, (host_class,), body)


def _new_adapted_layer(knows_tokens: bool, create: Any, args: tuple) -> nn.Module:
    layer = create(*args)
    layer.__class__ = adapted_layer_class(type(layer), knows_tokens)  # type: ignore[arg-type]
    return layer


def enclosing_layer(model: nn.Module, key: str) -> str | None:
    """Return the name of the layer that module `key` lies in: the unit that checkpointing recomputes, if any."""
    parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]  # innermost first
    for name in parents:
        if isinstance(model.get_submodule(name), GradientCheckpointingLayer):
            return name
    lists = [name for name in parents if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)]
    return lists[-1] if lists else None


def reads_text(model: nn.Module, layer: nn.Module | None) -> bool:
    """Whether a layer is one of a model's decoder, which reads token ids."""
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return False
    return any(module is layer for module in model.get_decoder().modules())


def knows_tokens(model: nn.Module, layer: nn.Module | None) -> bool:
    """Whether the root's inputs tell of a layer's tokens: the layer is its decoder's, and gets keyword arguments."""
    return reads_text(model, layer) and not model.config.is_encoder_decoder and _takes_kwargs(model)


def is_bidirectional(layer: nn.Module | None) -> bool:
    """Whether the attention in a layer is known to see later tokens."""
    if layer is None:
        return False
    return {module.is_causal for module in layer.modules() if hasattr(module, "is_causal")} == {False}


def _takes_kwargs(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def layer_width(model: nn.Module, name: str) -> int:
    """Return the width of the hidden states that enter layer `name`, from the config of the model around it.

    Raises:
        ValueError: if no config names it.
    """
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)] + [""]
    for parent in parents:
        width = getattr(getattr(model.get_submodule(parent), "config", None), "hidden_size", None)
        if width is not None:
            return width
    raise ValueError(
        f"The width of what enters {name!r} is unknown: no config around it has a hidden_size. Set router_input="
        "'target', where every target has its own router."
    )


def root_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of the root by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def token_context(model: PreTrainedModel, inputs: dict[str, Any]) -> RoutingContext | None:
    """Return what the inputs of the root tell of its tokens; `None` where it got none."""
    given = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if given is None:
        return None
    names = ("input_ids", "inputs_embeds", "attention_mask", "mm_token_type_ids", "condition_ids", "routing_overrides")
    own = getattr(model.base_model, "routing_context", None)
    if own is not None:  # one of our own models, which knows best
        return own(**{name: inputs.get(name) for name in names})
    shape, device = given.shape[:2], given.device
    token_mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask = inputs.get("attention_mask")
    # With a cache the mask covers the past as well. A 4-D mask belongs to a static cache, where all tokens are real.
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        token_mask = mask[:, -shape[1] :].bool()
    modality_ids = inputs.get("mm_token_type_ids")
    if modality_ids is None:
        modality_ids = torch.zeros(shape, dtype=torch.long, device=device)
        for modality, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"), start=1):
            token_id = getattr(model.config, name, None)
            if token_id is not None and inputs.get("input_ids") is not None:
                modality_ids = modality_ids.masked_fill(inputs["input_ids"] == token_id, modality)
    return RoutingContext(modality_ids[:, -shape[1] :].long(), token_mask, inputs.get("input_ids"))


_CONDITIONS: ContextVar[dict[str, Any] | None] = ContextVar("hf_moe_routing_inputs", default=None)


@contextmanager
def routing_inputs(**conditions: Any) -> Iterator[None]:
    """Give the routers of adapters the conditions of every row, where the call of a model has no place for them.

    `generate` refuses keyword arguments that its model does not name:

        with routing_inputs(task=torch.tensor([0, 1])):
            model.generate(**inputs)

    Args:
        conditions: name -> ids (B,), or features (B, C), of the rows; beams of a row share them.
    """
    token = _CONDITIONS.set({**(_CONDITIONS.get() or {}), **conditions})
    try:
        yield
    finally:
        _CONDITIONS.reset(token)


def take_conditions(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the conditions of the rows, and take those out of `kwargs` that the model itself knows nothing of."""
    conditions = {**(_CONDITIONS.get() or {}), **(kwargs.get("condition_ids") or {})}
    for module in model.modules():
        name = getattr(module, "condition", None) if isinstance(module, Router) else None
        if name is not None and f"{name}_ids" in kwargs:
            conditions[name] = kwargs[f"{name}_ids"]
    known = inspect.signature(model.forward).parameters
    for name in ("condition_ids", *(f"{name}_ids" for name in conditions)):
        if name not in known:
            kwargs.pop(name, None)
    return {name: torch.as_tensor(value) for name, value in conditions.items()}


def pass_context(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before the root's forward: pass the routing context on to the decoder layers."""
    if not any(getattr(module, "moe_lora_knows_tokens", False) for module in model.modules()):
        return None
    kwargs = dict(kwargs)
    conditions = take_conditions(model, kwargs)
    inputs = {**root_inputs(model, args, kwargs), "condition_ids": conditions or None}
    tokens = token_context(model, inputs)
    if tokens is None:
        return args, kwargs
    rows = len(tokens.token_mask)
    tokens.condition_ids = {
        name: value.repeat_interleave(max(rows // len(value), 1), dim=0) for name, value in conditions.items()
    }
    mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
    hides_padding = isinstance(mask, torch.Tensor) and mask.dim() != 2
    return args, {**kwargs, "moe_lora_context": AdapterContext(tokens, cache, hides_padding)}


def remember(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook after the root's forward: leave what the routers have pooled with the key-value cache."""
    context: AdapterContext | None = kwargs.get("moe_lora_context")
    if context is not None and isinstance(output, dict):
        keep_state(output.get("past_key_values"), context.pooled)
