"""How a decoder or a tower of Transformers is read: its layers, their feed-forwards, and how these are made."""

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FfnLayout:
    """The names under which a dense feed-forward keeps its projections.

    Attributes:
        up: the projection into the inner width; with the gate in its first half if `fused`.
        down: the projection back.
        gate: the gate's projection, if it has one of its own.
        fused: whether `up` holds gate and up.
        transposed: whether weights are stored (in, out), as GPT-2's `Conv1D` does; read from the feed-forward.
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
    FfnLayout(up="linear_fc1", down="linear_fc2"),
    FfnLayout(up="linear_1", down="linear_2"),
    FfnLayout(up="0", down="1"),
    FfnLayout(up="0", down="2"),
    FfnLayout(up="c_fc", down="c_proj"),
    FfnLayout(gate="w1", up="w3", down="w2"),
)

FFN_NAMES = ("mlp", "feed_forward", "ffn")
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function")
LAYER_LIST_NAMES = ("layers", "h")
# Where no config names the activation: in timm's towers, and in connectors.
NAMED_BY_CLASS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
ACTIVATION_CLASSES = {type(ACT2FN[name]): name for name in NAMED_BY_CLASS} | {nn.GELU: "gelu"}


@dataclass(frozen=True)
class HostFfn:
    """What a host's feed-forward is.

    Attributes:
        hidden_size: d.
        output_size: the width of its output; d but for connectors.
        intermediate_size: f, of one expert if the host's layer is a MoE.
        gated, bias: see [`MoELayerSpec`].
        layout: how a dense feed-forward names its projections; `None` for a MoE layer.
        returns_tuple: see [`MoELayerSpec`].
        activation: the name of its activation, by the module of it.
    """

    hidden_size: int
    output_size: int
    intermediate_size: int
    gated: bool
    bias: bool
    layout: FfnLayout | None
    returns_tuple: bool = False
    activation: str | None = None


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a host."""
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


def tower_layers(tower: nn.Module, connectors: Collection[nn.Module] = ()) -> nn.ModuleList | nn.Sequential:
    """Return the layers of a tower: its one list of modules with a feed-forward, connectors in it aside."""
    found = {
        path: module
        for path, module in tower.named_modules(memo=set(connectors))
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(_find_ffn, module))
    }
    if len(found) != 1:
        raise ValueError(
            f"{type(tower).__name__} cannot host MoE layers: layers with a feed-forward under "
            f"{' or '.join(FFN_NAMES)} are in {list(found) or 'none of its lists of modules'}, and one is needed. "
            "Choose another tower."
        )
    return next(iter(found.values()))


def _find_ffn(layer: nn.Module) -> str | None:
    return next((name for name in FFN_NAMES if isinstance(getattr(layer, name, None), nn.Module)), None)


def ffn_name(layer: nn.Module) -> str:
    """Return the attribute under which a layer keeps its feed-forward."""
    if (name := _find_ffn(layer)) is not None:
        return name
    raise ValueError(
        f"{type(layer).__name__} cannot host a MoE layer: no feed-forward under {' or '.join(FFN_NAMES)}; it has "
        f"{[name for name, _ in layer.named_children()]}."
    )


def read_ffn(ffn: nn.Module) -> HostFfn:
    """Return what a host's feed-forward is, dense or MoE."""
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
        layout = replace(layout, transposed=isinstance(getattr(ffn, layout.up), Conv1D))
        in_dim = 0 if layout.transposed else 1
        up, down = (getattr(ffn, item).weight.shape for item in (layout.up, layout.down))
        activations = (ACTIVATION_CLASSES.get(type(child)) for child in ffn.children())
        return HostFfn(
            hidden_size=up[in_dim],
            output_size=down[1 - in_dim],
            intermediate_size=down[in_dim],
            gated=layout.fused or layout.gate is not None,
            bias=biases.pop(),
            layout=layout,
            activation=next(filter(None, activations), None),
        )
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
    inner, outer = (1, 2) if True in forms else (2, 1)
    shape = stacks[0].down_proj.shape
    bias = hasattr(stacks[0], "down_proj_bias")
    returns_tuple = _returns_tuple(ffn, stacks[0])
    return HostFfn(shape[outer], shape[outer], shape[inner], True, bias, layout=None, returns_tuple=returns_tuple)


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
