# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
"""What the model's forward passes return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from .routing import ExpertAssignment, RoutingContext


@dataclass
class HfMoeModelOutputWithPast(ModelOutput):
    """
    Output of [`HfMoeModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, S, d)`): the decoder's last hidden state.
        past_key_values (`Cache`, *optional*): the decoder's cache.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): as the decoder returns them.
        router_logits (`tuple[torch.Tensor]` of shape `(T, C)`, *optional*): one per MoE layer, float32.
        image_hidden_states (`list[torch.Tensor]`, *optional*): the connected features of every image, (P', d) each.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class HfMoeCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`HfMoeForConditionalGeneration`].

    Args:
        loss (`torch.Tensor`, scalar, *optional*): language loss plus auxiliary loss, when labels are given.
        logits (`torch.Tensor` of shape `(B, S, vocab_size)`): prediction scores.
        past_key_values, hidden_states, attentions, router_logits, image_hidden_states: see
            [`HfMoeModelOutputWithPast`].
        aux_loss (`torch.Tensor`, scalar, *optional*): the auxiliary part of the loss.
        objective_values (`dict[str, torch.Tensor]`, *optional*): every objective's value before its coefficient.
        routing (`RoutingContext`, *optional*): modality ids, token mask and the decision of every MoE layer, with
            `output_routing=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: list[torch.Tensor] | None = None
    aux_loss: torch.Tensor | None = None
    objective_values: dict[str, torch.Tensor] | None = None
    routing: RoutingContext | None = None


def router_logits(context: RoutingContext) -> tuple[torch.Tensor, ...] | None:
    """Return the layers' router logits, or `None` where their widths differ: tools stack them."""
    assignments = [item for item in context.decisions.values() if isinstance(item, ExpertAssignment)]
    logits = [item.router_logits for item in assignments if item.router_logits is not None]
    if len({item.shape[-1] for item in logits}) != 1:
        return None
    return tuple(logits)
