"""What the forward passes return: a host's own outputs, with what the routing adds."""

from dataclasses import dataclass, fields, make_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from .decisions import ExpertAssignment
from .routing_context import RoutingContext


Output = TypeVar("Output", bound=ModelOutput)

# Since 5.24 there are multimodal ones, with `image_outputs`: what `get_image_features` returned.
MoeModelOutput: Any = getattr(
    modeling_outputs, "MultimodalMoeBaseModelOutputWithPast", modeling_outputs.MoeModelOutputWithPast
)
MoeCausalLMOutput: Any = getattr(
    modeling_outputs, "MultimodalMoeCausalLMOutputWithPast", modeling_outputs.MoeCausalLMOutputWithPast
)


@dataclass
class ComposedModelOutput(MoeModelOutput):
    """
    Output of a composed model without its head: what the decoder returns, and the images that were put into its text.

    Args:
        image_hidden_states (`list[torch.Tensor]`, *optional*): the connected features of every image, (P', d) each.
    """

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class ComposedCausalLMOutput(MoeCausalLMOutput):
    """Output of a composed model, with `image_hidden_states` as in [`ComposedModelOutput`]."""

    image_hidden_states: list[torch.Tensor] | None = None


# The compiler reads no dataclass: names are read here, once.
FIELDS = {
    output_class: {field.name for field in fields(output_class)}
    for output_class in (ComposedModelOutput, ComposedCausalLMOutput)
}


def extend_output(output_class: type[Output], outputs: ModelOutput, **ours: object) -> Output:
    """Return `outputs` as an `output_class`, with `ours`: the fields that the class of this release has."""
    given = {**outputs, **ours}
    return output_class(**{name: value for name, value in given.items() if name in FIELDS[output_class]})


# What a model with MoE layers returns beside its host's fields: the auxiliary loss, every objective's value before its
# coefficient, and the routing context with the decision of every MoE layer.
ROUTING_FIELDS: dict[str, Any] = {
    "router_logits": tuple[torch.Tensor, ...] | None,
    "aux_loss": torch.Tensor | None,
    "objective_values": dict[str, torch.Tensor] | None,
    "routing": RoutingContext | None,
}

# A host's class of outputs -> its subclass with these fields.
_ROUTED: dict[type, type] = {}


def prepare_outputs(forward: Any) -> None:
    """Make the classes of outputs that a forward says it returns: a compiler could not, when it traces."""
    try:
        hint = get_type_hints(forward).get("return")
    except NameError:  # of a type that is imported for type checkers alone
        return
    for cls in (hint, *get_args(hint)):
        if isinstance(cls, type) and issubclass(cls, ModelOutput):
            _routed_class(cls)


def _routed_class(output_class: type) -> type:
    if output_class not in _ROUTED:
        known = {item.name for item in fields(output_class)}
        added = [(name, kind, None) for name, kind in ROUTING_FIELDS.items() if name not in known]
        made = make_dataclass(output_class.__name__, added, bases=(output_class,), namespace={"__module__": __name__})
        _ROUTED[output_class] = made
    return _ROUTED[output_class]


def routed_output(output: ModelOutput, **ours: object) -> ModelOutput:
    """Return a host's output with what the routing adds."""
    return _routed_class(type(output))(**{**output, **ours})


def router_logits(context: RoutingContext) -> tuple[torch.Tensor, ...] | None:
    """Return the layers' router logits, or `None` where their widths differ: tools stack them."""
    assignments = [item for item in context.decisions.values() if isinstance(item, ExpertAssignment)]
    logits = [item.router_logits for item in assignments if item.router_logits is not None]
    if len({item.shape[-1] for item in logits}) != 1:
        return None
    return tuple(logits)
