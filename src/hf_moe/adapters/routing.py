"""How the routing context enters a model that knows nothing of it, and leaves it again.

The class of the root is swapped for a subclass of the same name that puts back, however its call ends, what the root's
variable held before. A hook on the root builds the context and passes it down as a keyword argument; both stand on the
backbone below a head as well, for callers that need no head. The class of every layer with a target is swapped for a
subclass that takes the argument and keeps it, with the hidden state that enters the layer, in a context variable while
the host's own forward runs. As an argument of the layer the context survives every kind of recomputation; hooks on
layers would not run again in one. Where a model drops the argument on the way, the layer's call takes it from the
root's variable, before a recomputation records the arguments.
"""

import functools
import inspect
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.inputs import conditions_read
from .conditions import conditions_of_rows, take_conditions
from .contexts import ACTIVE_LAYER, AdapterContext, LayerRun
from .index import index_of
from .tokens import image_context, root_inputs, text_context


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
        create, args, state = _reduced(self, host_class, protocol)
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


def _reduced(module: nn.Module, host_class: Any, protocol: int) -> tuple:
    """Return how to make a module of its host's class, with what arguments, and its state."""
    if "__reduce_ex__" in vars(host_class):  # a layer of our own models, itself a subclass that has no place in a file
        return host_class.__reduce_ex__(module, protocol)
    return host_class.__new__, (host_class,), module.__dict__


def _new_adapted_layer(knows_tokens: bool, create: Any, args: tuple) -> nn.Module:
    layer = create(*args)
    layer.__class__ = adapted_layer_class(type(layer), knows_tokens)  # type: ignore[arg-type]
    return layer


@functools.cache
def root_class(host_class: Any) -> Any:
    """Return the subclass of a root's class whose calls leave nothing behind, after an interrupt either; same name."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _ROOT_CONTEXT.get()
        try:
            return host_class.__call__(self, *args, **kwargs)
        finally:  # hooks are not called after a KeyboardInterrupt
            _ROOT_CONTEXT.set(before)

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
        create, args, state = _reduced(self, host_class, protocol)
        return _new_root, (create, args), state

    body = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "moe_lora_root_class": host_class}
    return type(host_class.__name__, (host_class,), {**body, "__module__": host_class.__module__})


def _new_root(create: Any, args: tuple) -> nn.Module:
    root = create(*args)
    root.__class__ = root_class(type(root))  # type: ignore[arg-type]
    return root


def pass_context(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before the forward of the root, or of its backbone: pass the routing context on to the decoder layers."""
    if is_inside() or not index_of(model).knows_tokens:
        return None
    kwargs = dict(kwargs)
    read = conditions_read(index_of(model).routers())
    given = take_conditions(model, kwargs, read)
    inputs = {**root_inputs(model, args, kwargs), "condition_ids": given or None}
    context = image_context if model.main_input_name == "pixel_values" else text_context
    passed = context(model, inputs, partial(conditions_of_rows, given, read))
    if passed is None:
        return args, kwargs
    passed.root = model
    _ROOT_CONTEXT.set(passed)  # until the call of the root ends
    return args, {**kwargs, "moe_lora_context": passed}


def context_of_call(model: nn.Module, kwargs: dict[str, Any]) -> AdapterContext | None:
    """Return the context of a forward that has returned, if `model` was called and no model around it."""
    context: AdapterContext | None = kwargs.get("moe_lora_context")
    return context if context is not None and context.root is model else None


def is_inside() -> bool:
    """Whether the forward of a model around this one is running."""
    return _ROOT_CONTEXT.get() is not None


def remember(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook after the root's forward: leave what the routers have pooled with the key-value cache."""
    context = context_of_call(model, kwargs)
    if context is None:
        return
    context.tokens.memory.keep(output, kwargs, args)
