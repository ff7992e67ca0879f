"""How the routing context enters a model that knows nothing of it, and reaches the layers with targets.

A hook on the root, or on the backbone below its head, opens the context and passes it down as a keyword argument.
The class of every layer with a target is swapped for a subclass that takes it, and makes it the active one while the
host's own forward runs. An argument of the layer survives every kind of recomputation; hooks would not run again.
"""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.auxiliary import is_learning
from ..modeling.context import open_call
from ..modeling.host import routed_layer_class
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.optimizer_steps import end_cleared_step
from ..modeling.routing_context import ACTIVE_CONTEXT, CALL_CONTEXT, RoutingContext
from ..modeling.subclasses import same_name
from .conditions import conditions_of_rows, take_conditions
from .contexts import LayerCall
from .index import index_of
from .tokens import call_context


# Name of the experts behind a whole layer, a child of it. PEFT passes over names with its own prefix when it unloads.
OUTPUT_EXPERTS = "output_experts"


@same_name
def adapted_layer_class(host_class: Any, knows_tokens: bool) -> dict[str, Any]:
    """Return the subclass of a layer's class that takes `moe_lora_context`, and runs the experts after the layer.

    `knows_tokens` says whether the root's context is about the tokens of this layer.
    """
    names = list(inspect.signature(host_class.forward).parameters)[1:]
    place = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None
    routed = getattr(host_class, "made_by", None) is routed_layer_class

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Where a model drops the argument on its way: here, before a recomputation records the arguments.
        if "moe_lora_context" not in kwargs:
            kwargs["moe_lora_context"] = CALL_CONTEXT.get()
        return host_class.__call__(self, *args, **kwargs)

    def forward(self: Any, *args: Any, moe_lora_context: RoutingContext | None = None, **kwargs: Any) -> Any:
        if moe_lora_context is None and not any(index_of(self).active()):  # what is disabled costs nothing
            return host_class.forward(self, *args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        positional = args[place] if place is not None and place < len(args) else None
        other = kwargs.get("encoder_hidden_states", positional)
        call = LayerCall(moe_lora_context, hidden_states, other, knows_tokens)
        # A layer of our own models makes its own context the active one, that of the images in a tower, say.
        context = kwargs.get("routing_context")
        if not isinstance(context, RoutingContext):
            context = RoutingContext.all_text(hidden_states) if moe_lora_context is None else moe_lora_context
            kwargs |= {"routing_context": context} if routed else {}
        around, context.layer_call = context.layer_call, call
        token = ACTIVE_CONTEXT.set(context)
        try:
            output = host_class.forward(self, *args, **kwargs)
            experts = self._modules.get(OUTPUT_EXPERTS)
            if experts is None:
                return output
            return (experts(output[0]), *output[1:]) if isinstance(output, tuple) else experts(output)
        finally:
            ACTIVE_CONTEXT.reset(token)
            context.layer_call = around

    # A layer of another kind may be called again in a recomputation, when the root has returned.
    body = {"forward": forward, "moe_lora_knows_tokens": knows_tokens}
    return body | ({"__call__": __call__} if issubclass(host_class, GradientCheckpointingLayer) else {})


def root_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call of the root by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def before_call(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Hook before the forward of the root, or of its backbone: pass the routing context on to the layers."""
    index = index_of(model)
    index.hold_frozen()
    if CALL_CONTEXT.get() is not None:
        return None
    if is_learning(model):  # where no optimizer tells of the end of a step
        end_cleared_step(model)
    if not index.knows_tokens or not any(index.active()):
        return None
    kwargs = dict(kwargs)
    given = take_conditions(model, kwargs, index.conditions)
    inputs = {**root_inputs(model, args, kwargs), "condition_ids": given or None}
    context = kwargs.get("routing_context")
    if isinstance(model, HfMoeForConditionalGeneration):  # which knows best
        context = kwargs["routing_context"] = model.open_context(**inputs) if context is None else context
    else:
        context = call_context(model, inputs)
    if context is None:
        return args, kwargs
    context.condition_ids = conditions_of_rows(given, index.conditions, len(context.token_mask))
    open_call(model, context)
    return args, {**kwargs, "moe_lora_context": context}
