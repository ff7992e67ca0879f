"""Mixture of transformers: every weight of a layer exists once per modality, and attention is shared.

    a = norm_m(x)        q, k, v = a Wq_m, a Wk_m, a Wv_m        o = attention(q, k, v) over all tokens
    x <- x + o Wo_m        x <- x + FFN_m(norm'_m(x))            m the modality of the token x

There is no router: the modality of a token is known. A token costs what it costs in the dense model, and weights grow
with the number of modalities. The projections and norms of the host are copied in place, so attention, positions and
cache stay the host's, and a model that is made from a host computes what the host does. A feed-forward that is a MoE
layer stays one for all: its router may keep experts to their modalities.

Source: Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models,
arXiv:2411.04996.
"""

from collections.abc import Iterator
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..block import Block, Parts
from ..host_layers import expert_stacks, ffn_name
from ..layer_spec import MoELayerSpec
from ..per_modality import PerModality
from ..registry import register_layer
from ..replacement import UnsuitedLayer


@register_layer("mot_transformers")
class MixtureOfTransformers:
    """Unties the projections and norms of a layer by modality.

    Args:
        spec, parts, layer: see `replacement.py`.
        modalities (`list[str]`, *optional*, defaults to `["text", "image"]`): those with weights of their own. Video
            shares those of images unless it is named; any other modality those of text.
        untie (`list[str]`, *optional*, defaults to all): which weights, of `"ffn"`, `"attention"` and `"norm"`.

    Raises:
        ValueError: if `modalities` do not begin with text; if the layer has experts of its own, or nothing to untie;
            if all layers have Mamba mixers, and attention is to be untied.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        layer: nn.Module,
        *,
        modalities: list[str] | tuple[str, ...] = ("text", "image"),
        untie: list[Literal["ffn", "attention", "norm"]] | tuple[str, ...] = ("ffn", "attention", "norm"),
    ):
        if "attention" in untie and any(hasattr(module, "A_log") for module in layer.modules()):
            raise UnsuitedLayer(
                f"Layer {spec.layer_idx} ({type(layer).__name__}) has a Mamba mixer, which reads the weights of its "
                "projections itself: choose the layer 'mixture_of_mamba', or leave 'attention' out of untie."
            )
        feed_forward = getattr(layer, ffn_name(layer))
        if "ffn" in untie and not isinstance(feed_forward, Block) and expert_stacks(feed_forward):
            raise ValueError(
                f"Layer {spec.layer_idx} ({type(layer).__name__}) has experts already, which are not of one modality: "
                "leave 'ffn' out of untie, or choose a dense host."
            )
        found = [(path, module) for path, module, part in _token_wise(layer) if part in untie]
        if not found:
            raise ValueError(
                f"Layer {spec.layer_idx} ({type(layer).__name__}) holds no linear map or norm of {list(untie)}."
            )
        for path, module in found:
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, PerModality(module, modalities))


def _token_wise(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the modules of a layer that map tokens one by one, with their paths and what they are part of."""
    feed_forward = f"{ffn_name(layer)}."
    blocks = tuple(f"{path}." for path, module in layer.named_modules() if isinstance(module, Block))
    for path, module in list(layer.named_modules()):
        if path.startswith(blocks):
            continue
        shapes = [parameter.dim() for parameter in module.parameters(recurse=False)]
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module, "ffn" if path.startswith(feed_forward) else "attention"
        elif shapes and max(shapes) == 1 and not list(module.children()):
            yield path, module, "norm"
