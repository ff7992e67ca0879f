"""The host: how the feed-forwards of a decoder, tower or connector of Transformers become MoE layers.

Two things are done to a decoder or tower. The feed-forward of every MoE layer is replaced by a block. The class of
every layer is swapped for a subclass of the same name whose `forward` takes `routing_context` and holds it in a
context variable while the host's own forward runs. The context stays an argument of the layer, the one thing that
survives every kind of recomputation, and the variable reaches a block that PEFT or a compiler has wrapped.
"""

from typing import Any

from torch import nn

from ..configuration.layer_maps import at_layer
from .block import Block
from .configured_parts import ConfiguredParts, build_block
from .host_layers import ACTIVATION_FIELDS, HostFfn, ffn_name, read_ffn
from .layer_spec import MoELayerSpec
from .registry import build
from .replacement import UnsuitedLayer
from .routing_context import ACTIVE_CONTEXT, CALL_CONTEXT
from .subclasses import same_name


def layer_spec(moe, host_config, layer_idx: int, host_ffn: HostFfn, **facts: Any) -> MoELayerSpec:
    """Resolve the facts of a MoE layer from its config and the feed-forward it replaces, see [`install_blocks`]."""
    named = (getattr(host_config, name, None) for name in ACTIVATION_FIELDS)
    # A host that names none has it in its code. A build compares its experts with the feed-forward they come from.
    activation = next(filter(None, named), host_ffn.activation or "silu")
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
        hidden_size=host_ffn.hidden_size,
        output_size=None if host_ffn.output_size == host_ffn.hidden_size else host_ffn.output_size,
        num_experts=at_layer(moe.num_experts, layer_idx),
        num_experts_per_tok=at_layer(moe.num_experts_per_tok, layer_idx),
        expert_intermediate_size=width,
        hidden_act=activation,
        gated=host_ffn.gated,
        bias=host_ffn.bias,
        banks=banks,
        returns_tuple=host_ffn.returns_tuple,
        **facts,
    )


def install_blocks(layers: Any, config, moe, host_config, **facts: Any) -> None:
    """Change the layers that a `MoeConfig` names, and make all of them carry the routing context.

    Feed-forwards become MoE layers first; then come the kinds `attention` and `layer`, which change the rest.

    Args:
        layers: of the decoder or tower.
        config: the outer `HfMoeConfig`.
        moe: the `MoeConfig` of this decoder or tower.
        host_config: the config of the decoder or tower itself.
        facts: what else holds of all these layers, see [`MoELayerSpec`].
    """
    for layer_idx in moe.moe_layers(len(layers)):
        layer = layers[layer_idx]
        name = ffn_name(layer)
        ffn = getattr(layer, name)
        block = build_block(config, moe, layer_spec(moe, host_config, layer_idx, read_ffn(ffn), **facts))
        # No feature depends on the last layers of some towers, which stay out of training.
        block.requires_grad_(any(parameter.requires_grad for parameter in ffn.parameters()))
        setattr(layer, name, block)
    parts = ConfiguredParts(config, moe)
    for kind in ("attention", "layer"):
        changed, refusals = 0, []
        for layer_idx, layer in enumerate(layers):
            if at_layer(getattr(moe, kind), layer_idx) is not None:
                spec = _place_spec(moe, host_config, layer_idx, part=kind, **facts)
                try:
                    build(kind, *parts.named(kind, spec), spec, parts, layer)
                    changed += 1
                except UnsuitedLayer as refusal:  # as the few layers of a hybrid that attend
                    refusals.append(refusal)
        if refusals and not changed:
            raise refusals[0]
    for layer in layers:
        layer.__class__ = routed_layer_class(type(layer))


def _place_spec(moe, host_config, layer_idx: int, **facts: Any) -> MoELayerSpec:
    """Return the facts of a place in a layer that is no feed-forward: experts have no width there but d."""
    numbers = (at_layer(moe.num_experts, layer_idx), at_layer(moe.num_experts_per_tok, layer_idx))
    return MoELayerSpec(layer_idx, host_config.hidden_size, *numbers, host_config.hidden_size, **facts)


def install_in_connector(model: nn.Module, path: str, config, moe) -> Block:
    """Replace the feed-forward of a connector by a MoE layer, which is returned.

    Args:
        path: of the connector in the model; the feed-forward is the connector itself, or one of its parts.
        config, moe: see [`install_blocks`].
    """
    for name, part in model.get_submodule(path).named_modules():
        try:
            ffn = read_ffn(part)
        except ValueError:
            continue
        block = build_block(config, moe, layer_spec(moe, None, 0, ffn, place="connector", causal=False))
        parent, _, own = f"{path}.{name}".rstrip(".").rpartition(".")
        setattr(model.get_submodule(parent), own, block)
        return block
    raise ValueError(
        f"The connector {path} cannot host a MoE layer: none of its parts is two linear layers with an activation. "
        "Leave connector_moe_config out, or choose a connector such as 'mlp'."
    )


@same_name
def routed_layer_class(host_class: Any) -> dict[str, Any]:
    """Return the subclass of a layer's class that takes `routing_context`."""

    def forward(self, *args: Any, routing_context: Any = None, **kwargs: Any) -> Any:
        token = ACTIVE_CONTEXT.set(routing_context)
        try:
            return host_class.forward(self, *args, **kwargs)
        finally:
            ACTIVE_CONTEXT.reset(token)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where no argument comes this far, as in a tower: here, before a recomputation records the arguments.
        if kwargs.get("routing_context") is None:
            context = ACTIVE_CONTEXT.get()
            kwargs["routing_context"] = CALL_CONTEXT.get() if context is None else context
        return host_class.__call__(self, *args, **kwargs)

    return {"forward": forward, "__call__": __call__}
