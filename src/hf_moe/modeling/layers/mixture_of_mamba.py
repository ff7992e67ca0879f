"""Mixture of Mamba: the projections of a Mamba mixer exist once per modality, and the scan is shared.

    [x_t, z_t] = h_t W_in^m                     x <- silu(conv(x))              m the modality of token t
    [dt'_t, B_t, C_t] = x_t W_x^m               dt_t = softplus(dt'_t W_dt^m + b_dt^m)
    s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t    y_t = C_t s_t + D x_t           o_t = (y_t silu(z_t)) W_out^m

h is (T, d), x and z (T, d_in), dt' (T, r), B, C and s have n numbers per channel. Convolution, A and D are those of
all tokens, so modalities meet in the state. There is no router: the modality of a token is known. A token costs what
it costs in the dense mixer, and the weights of what is split grow with the number of modalities.

The mixer is the host's own, with its scan and its cache; the projections are copied in place, so a model that is made
from a host computes what the host does. A mixer of Mamba 2 has no `x_proj` and `dt_proj`: its `in_proj` makes dt, B
and C as well. The kernel that runs a whole mixer at once in training has one weight for all tokens and stays off; the
kernels of convolution and scan are used.

Source: Mixture-of-Mamba: Enhancing Multi-Modal State-Space Models with Modality-Aware Sparsity, arXiv:2501.16295.
"""

from typing import Any, Literal

import torch
from torch import nn

from ..block import Parts
from ..host_layers import ffn_name
from ..layer_spec import MoELayerSpec
from ..per_modality import PerModality
from ..registry import register_layer
from ..replacement import UnsuitedLayer
from ..subclasses import same_name


PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@register_layer("mixture_of_mamba")
class MixtureOfMamba:
    """Splits the projections of a layer's Mamba mixer by modality. Layers that attend stay as they are.

    Args:
        spec, parts, layer: see `replacement.py`.
        modalities (`list[str]`, *optional*, defaults to `["text", "image"]`): those with weights of their own. Video
            shares those of images unless it is named; any other modality those of text.
        split (`list[str]`, *optional*, defaults to all): which projections, of `"in_proj"`, `"x_proj"`, `"dt_proj"`
            and `"out_proj"`.
        split_norm (`bool`, *optional*, defaults to `True`): whether norms of the mixer and of its input are split too.

    Raises:
        ValueError: if `modalities` do not begin with text; if no layer of the host has a Mamba mixer beside a
            feed-forward.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        layer: nn.Module,
        *,
        modalities: list[str] | tuple[str, ...] = ("text", "image"),
        split: list[Literal["in_proj", "x_proj", "dt_proj", "out_proj"]] | tuple[str, ...] = PROJECTIONS,
        split_norm: bool = True,
    ):
        mixer = _find_mixer(layer)
        for name, module in list(mixer.named_children()):
            if name == "dt_proj" and name in split:
                mixer.dt_proj = TimeSteps(module, modalities)
            elif name in split or (split_norm and _is_norm(module)):
                setattr(mixer, name, PerModality(module, modalities))
        if split_norm:
            layer.input_layernorm = PerModality(layer.input_layernorm, modalities)
        mixer.__class__ = unfused_class(type(mixer))
        mixer.train()


class TimeSteps(PerModality):
    """The projection dt' (B, S, r) -> (B, S, d_in) with its bias, in the place of a module that the host never calls.

    The host multiplies `weight` by dt' (B, r, S), and adds `bias` where there is one.
    """

    bias = None

    @property
    def weight(self) -> "TimeSteps":
        return self

    def __matmul__(self, low_rank: torch.Tensor) -> torch.Tensor:
        return self(low_rank.transpose(1, 2)).transpose(1, 2)  # (B, d_in, S)


@same_name
def unfused_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a mixer's class that never takes itself to be in training.

    Nothing but the fused kernel depends on it: a mixer has no dropout.
    """

    def train(self: Any, mode: bool = True) -> Any:
        host_class.train(self, mode)
        self.training = False
        return self

    return {"train": train}


def _find_mixer(layer: nn.Module) -> Any:
    ffn_name(layer)  # decoders of mixers alone give their projections first values by name
    for module in layer.children():
        if all(hasattr(module, name) for name in ("in_proj", "A_log", "out_proj")):
            return module
    raise UnsuitedLayer(
        f"{type(layer).__name__} has no Mamba mixer whose projections could be split. Choose a host with Mamba "
        "layers, such as Jamba or Bamba; for layers that attend there is 'mot_transformers'."
    )


def _is_norm(module: nn.Module) -> bool:
    return {parameter.dim() for parameter in module.parameters()} == {1}
