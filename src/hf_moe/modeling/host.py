"""The host: how a Transformers decoder is read, and how its feed-forwards become MoE layers.

Two things are done to a host. The feed-forward of every MoE layer is replaced by a block. The class of every
decoder layer is swapped for a subclass of the same name whose `forward` takes `routing_context` and holds it in a
context variable while the host's own forward runs. The context stays an argument of the layer, the one thing that
survives every kind of recomputation, and the variable reaches a block that PEFT or a compiler has wrapped.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.layer_maps import at_layer
from .block import Block
from .configured_parts import build_block
from .layer_spec import MoELayerSpec
from .routing_context import ACTIVE_CONTEXT, CALL_CONTEXT


@dataclass(frozen=True)
class FfnLayout:
    """The names under which a dense feed-forward keeps its projections.

    Attributes:
        up: the projection into the inner width; with the gate in its first half if `fused`.
        down: the projection back.
        gate: the gate's projection, if it has one of its own.
        fused: whether `up` holds gate and up.
        transposed: whether weights are stored (in, out), as GPT-2's `Conv1D` does.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    transposed: bool = False


LAYOUTS = (
    FfnLayout(gate="gate_proj", up="up_proj", down="down_proj"),
    FfnLayout(up="gate_up_proj", down="down_proj", fused=True),
    FfnLayout(up="up_proj", down="down_proj"),
    FfnLayout(up="dense_h_to_4h", down="dense_4h_to_h"),
    FfnLayout(up="fc1", down="fc2"),
    FfnLayout(up="c_fc", down="c_proj", transposed=True),
    FfnLayout(gate="w1", up="w3", down="w2"),
)

FFN_NAMES = ("mlp", "feed_forward", "ffn")
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function")
LAYER_LIST_NAMES = ("layers", "h")


@dataclass(frozen=True)
class HostFfn:
    """What a host's feed-forward is.

    Attributes:
        intermediate_size: f, of one expert if the host's layer is a MoE.
        gated, bias: see [`MoELayerSpec`].
        layout: how a dense feed-forward names its projections; `None` for a MoE layer.
        returns_tuple: see [`MoELayerSpec`].
    """

    intermediate_size: int
    gated: bool
    bias: bool
    layout: FfnLayout | None
    returns_tuple: bool = False


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a host.

    Raises:
        ValueError: if the model is no decoder, or keeps its layers under no known name.
    """
    name = type(language_model).__name__
    if getattr(language_model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} cannot host MoE layers: it is an encoder-decoder, and the host must be a decoder.")
    for attribute in LAYER_LIST_NAMES:
        layers = getattr(language_model, attribute, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"{name} cannot host MoE layers: no list of decoder layers under {' or '.join(LAYER_LIST_NAMES)}; it has "
        f"{[child for child, _ in language_model.named_children()]}."
    )


def ffn_name(layer: nn.Module) -> str:
    """Return the attribute under which a decoder layer keeps its feed-forward.

    Raises:
        ValueError: if it keeps it under no known name.
    """
    for name in FFN_NAMES:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise ValueError(
        f"{type(layer).__name__} cannot host a MoE layer: no feed-forward under {' or '.join(FFN_NAMES)}; it has "
        f"{[name for name, _ in layer.named_children()]}."
    )


def read_ffn(ffn: nn.Module) -> HostFfn:
    """Return what a host's feed-forward is, dense or MoE.

    Raises:
        ValueError: if its projections have no known names, or it is more than its projections.
    """
    name = type(ffn).__name__
    inputs = [p.name for p in inspect.signature(ffn.forward).parameters.values() if p.default is p.empty]
    if len(inputs) != 1:
        raise ValueError(f"{name} cannot become a MoE layer: it takes {inputs}, not the hidden states alone.")
    if hasattr(ffn, "experts") or expert_stacks(ffn):
        return _read_experts(ffn)
    for layout in LAYOUTS:
        projections = [item for item in (layout.gate, layout.up, layout.down) if item is not None]
        if not all(hasattr(getattr(ffn, item, None), "weight") for item in projections):
            continue
        biases = {getattr(ffn, item).bias is not None for item in projections}
        held = {parameter for parameter, _ in ffn.named_parameters()}
        extra = held - {f"{item}.{kind}" for item in projections for kind in ("weight", "bias")}
        if extra or len(biases) > 1:
            raise ValueError(
                f"{name} cannot become a MoE layer: experts have no place for {sorted(extra)}."
                if extra
                else f"{name} cannot become a MoE layer: only some of its projections {projections} have a bias."
            )
        width = getattr(ffn, layout.down).weight.shape[0 if layout.transposed else 1]
        return HostFfn(width, gated=layout.fused or layout.gate is not None, bias=biases.pop(), layout=layout)
    raise ValueError(
        f"{name} cannot become a MoE layer: its projections {[child for child, _ in ffn.named_children()]} are none "
        f"of {[(layout.gate, layout.up, layout.down) for layout in LAYOUTS]}."
    )


def expert_stacks(block: nn.Module) -> dict[str, nn.Module]:
    """Return the stacks of gated experts in a MoE block by their paths: one, or one for each of its banks."""
    return {
        path: module
        for path, module in block.named_modules()
        if getattr(module, "gate_up_proj", None) is not None and getattr(module.gate_up_proj, "ndim", 0) == 3
    }


def stored_in_out(experts: nn.Module) -> bool | None:
    """Whether a stack keeps its matrices (in, out) rather than (out, in); `None` if it has neither form."""
    stack, down = experts.gate_up_proj, experts.down_proj
    if getattr(experts, "is_concatenated", True):  # Transformers marks stacks whose gate and up rows alternate
        for in_out, (inner, outer) in ((False, (1, 2)), (True, (2, 1))):
            if stack.shape[inner] == 2 * down.shape[outer] and stack.shape[outer] == down.shape[inner]:
                return in_out
    return None


def _read_experts(ffn: nn.Module) -> HostFfn:
    stacks = list(expert_stacks(ffn).values())
    forms = {stored_in_out(experts) for experts in stacks}
    if len(forms) != 1 or None in forms:
        raise ValueError(
            f"{type(ffn).__name__} cannot become a MoE layer: its experts are not stacked as gate_up_proj (E, 2f, d) "
            "and down_proj (E, d, f), or both (in, out), with the gate before the up projection. Choose another host."
        )
    width = stacks[0].down_proj.shape[1 if True in forms else 2]
    bias = hasattr(stacks[0], "down_proj_bias")
    return HostFfn(width, gated=True, bias=bias, layout=None, returns_tuple=_returns_tuple(ffn, stacks[0]))


def _returns_tuple(block: nn.Module, experts: nn.Module) -> bool:
    """Whether a MoE block returns more than its output, and its layer unpacks it.

    Told on the meta device, at no cost. A block whose work depends on where tokens go does not run there; the layers
    of those that Transformers has look at what they are given.
    """
    tensors = {name: tensor.to("meta") for name, tensor in (*block.named_parameters(), *block.named_buffers())}
    hidden = experts.down_proj.new_empty(
        1, 1, experts.down_proj.shape[2 if stored_in_out(experts) else 1], device="meta"
    )
    try:
        with torch.no_grad():
            return isinstance(torch.func.functional_call(block, tensors, (hidden,)), tuple)
    except Exception:  # whatever a foreign block trips over without values
        return False


def layer_spec(config, layer_idx: int, host_ffn: HostFfn) -> MoELayerSpec:
    """Resolve the facts of one MoE layer from the config and the feed-forward it replaces.

    Raises:
        ValueError: if the experts would have no width.
    """
    moe, text = config.moe_config, config.get_text_config(decoder=True)
    # A host that names none has it in its code. A build compares its experts with the feed-forward they come from.
    activation = next((getattr(text, name) for name in ACTIVATION_FIELDS if getattr(text, name, None)), "silu")
    granularity = at_layer(moe.granularity, layer_idx)
    width = at_layer(moe.expert_intermediate_size, layer_idx) or host_ffn.intermediate_size // granularity
    if width < 1:
        raise ValueError(
            f"Layer {layer_idx}: moe_config.granularity={granularity} leaves experts no width: the feed-forward they "
            f"divide has {host_ffn.intermediate_size}."
        )
    banks = tuple(
        (name, bank["num_experts"], bank.get("intermediate_size") or width)
        for name, bank in (at_layer(moe.expert_banks, layer_idx) or {}).items()
    )
    return MoELayerSpec(
        layer_idx=layer_idx,
        hidden_size=text.hidden_size,
        num_experts=at_layer(moe.num_experts, layer_idx),
        num_experts_per_tok=at_layer(moe.num_experts_per_tok, layer_idx),
        expert_intermediate_size=width,
        hidden_act=activation,
        gated=host_ffn.gated,
        bias=host_ffn.bias,
        banks=banks,
        returns_tuple=host_ffn.returns_tuple,
    )


def install_moe_layers(language_model: PreTrainedModel, config) -> dict[int, Block]:
    """Replace the feed-forwards that the config names and make every decoder layer carry the routing context.

    Returns:
        The MoE layers by layer index.
    """
    installed = {}
    layers = decoder_layers(language_model)
    for layer_idx in config.moe_layers():
        layer = layers[layer_idx]
        name = ffn_name(layer)
        spec = layer_spec(config, layer_idx, read_ffn(getattr(layer, name)))
        installed[layer_idx] = build_block(config, config.moe_config, spec)
        setattr(layer, name, installed[layer_idx])
    for layer in layers:
        layer.__class__ = routed_layer_class(type(layer))  # type: ignore[arg-type]
    return installed


@functools.cache
def routed_layer_class(host_class: Any) -> Any:
    """Return the subclass of a decoder layer's class that takes `routing_context`.

    It keeps the host's name, by which device maps and FSDP wrapping policies find it, and pickles.
    """

    def forward(self, *args: Any, routing_context: Any = None, **kwargs: Any) -> Any:
        token = ACTIVE_CONTEXT.set(routing_context)
        try:
            return host_class.forward(self, *args, **kwargs)
        finally:
            ACTIVE_CONTEXT.reset(token)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where the host drops the argument on its way: here, before a recomputation records the arguments.
        if kwargs.get("routing_context") is None:
            kwargs["routing_context"] = CALL_CONTEXT.get()
        return host_class.__call__(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _new_routed_layer, (host_class,), self.__dict__

    body = {
        "forward": forward,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": host_class.__module__,
    }
    return type(host_class.__name__, (host_class,), body)


def _new_routed_layer(host_class: Any) -> nn.Module:
    cls = routed_layer_class(host_class)
    return cls.__new__(cls)
