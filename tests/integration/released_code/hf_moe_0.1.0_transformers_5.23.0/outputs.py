# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 0c87989b7e063e8ac15fd00febb57079724ffa3127fc85a28cada36c6d45f492
"""What the model's forward passes return."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from .routing import ExpertAssignment, RoutingContext


Output = TypeVar("Output", bound=ModelOutput)

# Since 5.24 there are multimodal ones, with `image_outputs`: what `get_image_features` returned.
MoeModelOutput: Any = getattr(
    modeling_outputs, "MultimodalMoeBaseModelOutputWithPast", modeling_outputs.MoeModelOutputWithPast
)
MoeCausalLMOutput: Any = getattr(
    modeling_outputs, "MultimodalMoeCausalLMOutputWithPast", modeling_outputs.MoeCausalLMOutputWithPast
)


@dataclass
class HfMoeModelOutputWithPast(MoeModelOutput):
    """
    Output of [`HfMoeModel`]: what the decoder returns, and the images that were put into its text.

    Args:
        image_hidden_states (`list[torch.Tensor]`, *optional*): the connected features of every image, (P', d) each.
    """

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class HfMoeCausalLMOutputWithPast(MoeCausalLMOutput):
    """
    Output of [`HfMoeForConditionalGeneration`]. `loss` is the language loss plus `aux_loss`, when labels are given;
    the language loss alone where gradients are off.

    Args:
        image_hidden_states (`list[torch.Tensor]`, *optional*): the connected features of every image, (P', d) each.
        objective_values (`dict[str, torch.Tensor]`, *optional*): every objective's value before its coefficient.
        routing (`RoutingContext`, *optional*): modality ids, token mask and the decision of every MoE layer, with
            `output_routing=True`.
    """

    image_hidden_states: list[torch.Tensor] | None = None
    objective_values: dict[str, torch.Tensor] | None = None
    routing: RoutingContext | None = None


# The compiler reads no dataclass: names are read here, once.
FIELDS = {
    output_class: {field.name for field in fields(output_class)}
    for output_class in (HfMoeModelOutputWithPast, HfMoeCausalLMOutputWithPast)
}


def extend_output(output_class: type[Output], outputs: ModelOutput, **ours: object) -> Output:
    """Return `outputs` as an `output_class`, with `ours`: the fields that the class of this release has."""
    given = {**outputs, **ours}
    return output_class(**{name: value for name, value in given.items() if name in FIELDS[output_class]})


def router_logits(context: RoutingContext) -> tuple[torch.Tensor, ...] | None:
    """Return the layers' router logits, or `None` where their widths differ: tools stack them."""
    assignments = [item for item in context.decisions.values() if isinstance(item, ExpertAssignment)]
    logits = [item.router_logits for item in assignments if item.router_logits is not None]
    if len({item.shape[-1] for item in logits}) != 1:
        return None
    return tuple(logits)
