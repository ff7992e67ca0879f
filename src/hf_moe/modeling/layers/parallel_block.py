"""Parallel block: attention and feed-forward read the same normed input.

    u = norm(x)        y = x + A(u) + F(u)        in place of  h = x + A(norm(x))    y = h + F(norm'(h))

The host's layer runs as it is. What its first norm returns is kept, and comes out again where the norm before its
feed-forward was, whose weights are gone. Norms after A and F, as Gemma has them, stay. A trained host computes
something else as parallel blocks, and has to be trained further; Cohere and others have them to begin with.

Sources: PaLM: Scaling Language Modeling with Pathways, arXiv:2204.02311; BAM! Just Like That: Simple and Efficient
Parameter Upcycling for Mixture of Experts, arXiv:2408.08274, whose experts of both kinds run at once.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from ..block import Parts
from ..layer_spec import MoELayerSpec
from ..registry import register_layer
from ..replacement import Replacement
from ..routing_context import active_context


# The norm before the feed-forward; where a layer has both, the second follows its attention.
FEED_FORWARD_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")


@register_layer("parallel_block")
class ParallelBlock:
    """Gives the feed-forward of a layer what its attention reads.

    Args:
        spec, parts, layer: see `replacement.py`.

    Raises:
        ValueError: if the layer has no norm before its attention, or none before its feed-forward.
    """

    def __init__(self, spec: MoELayerSpec, parts: Parts, layer: nn.Module):
        children = dict(layer.named_children())
        name = next((name for name in FEED_FORWARD_NORMS if name in children), None)
        if name is None or "input_layernorm" not in children:
            raise ValueError(
                f"{type(layer).__name__} cannot become a parallel block: it needs the norms input_layernorm and "
                f"{' or '.join(FEED_FORWARD_NORMS)}, and has {list(children)}. It may be one already: leave "
                "moe_config.layer out, or choose a host such as Llama."
            )
        key = f"parallel_block {spec.site}"
        layer.input_layernorm.register_forward_hook(partial(_keep, key))
        setattr(layer, name, KeptInput(key))


class KeptInput(Replacement):
    """Returns what the first norm of the layer has returned."""

    changes_layer = True

    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def start_from(self, module: nn.Module) -> None:
        """Nothing of the norm is needed."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = active_context(hidden_states).carry.pop(self.key)
        return normed


def _keep(key: str, norm: nn.Module, args: Any, output: torch.Tensor) -> None:
    active_context(output).carry[key] = output
