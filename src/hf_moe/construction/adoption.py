"""Adoption: a decoder that is a MoE already becomes this library's, with its routers and its experts.

What a block is, [`read_block`] tells from what it holds; whether the MoE layer that takes over its weights computes
the same, [`check_block`] tells. Layers that the host keeps dense stay dense.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..modeling.block import Block
from ..modeling.host_layers import decoder_layers, ffn_name
from ..modeling.initialisation import initialize_mechanisms
from ..modeling.mechanisms import get_mechanism
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.registry import build
from .block_checks import check_block
from .materialisation import materialise
from .moe_blocks import BlockReading, read_block
from .upcycling import copy_host


# Of a layer whose block has no such part, where another layer's has.
WITHOUT = {
    "num_shared_experts": 0,
    "shared_intermediate_size": None,
    "shared_expert_gate": False,
    "expert_banks": None,
}


def read_blocks(decoder: PreTrainedModel) -> dict[int, BlockReading]:
    """Return what the MoE blocks of a decoder are, by layer; without any if it is dense. Works on the meta device.

    Raises:
        ValueError: if a block cannot be adopted, with the layer and the reason.
    """
    readings = {}
    for layer_idx, layer in enumerate(decoder_layers(decoder)):
        try:
            reading = read_block(getattr(layer, ffn_name(layer)), decoder.config)
        except ValueError as error:
            raise ValueError(f"Layer {layer_idx} of {type(decoder).__name__}: {error}") from error
        if reading is not None:
            readings[layer_idx] = reading
    return readings


def adopted_config(readings: Mapping[int, BlockReading]) -> dict[str, Any]:
    """Return the `moe_config` of the blocks that were read: one value per field, or a map where layers differ."""
    joined: dict[str, Any] = {"layers": list(readings)}
    for name in dict.fromkeys(name for reading in readings.values() for name in reading.fields):
        values = {
            str(layer_idx): reading.fields.get(name, WITHOUT.get(name)) for layer_idx, reading in readings.items()
        }
        first = next(iter(values.values()))
        joined[name] = first if all(value == first for value in values.values()) else values
    return joined


@torch.no_grad()
def take_block(layer: Block, block: nn.Module, reading: BlockReading) -> None:
    """Copy a block's tensors into the layer that takes its place, and compare the two.

    Statistics start anew, and so does the bias of a router that has one where the host has none.

    Raises:
        ValueError: if the layer has another shape, or computes something else.
    """
    state = reading.state(block.state_dict())
    kept = {name for name in layer.state_dict() if name in {f"gate.{item}" for item, _ in layer.gate.named_buffers()}}
    result = layer.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - kept
    if missing or result.unexpected_keys:
        raise ValueError(
            f"Layer {layer.layer_idx} does not fit {type(block).__name__}: {sorted(missing)} would be left empty, and "
            f"{sorted(result.unexpected_keys)} have no place. Build it from the config that adoption returns."
        )
    if layer.spec.num_experts_per_tok == reading.fields["num_experts_per_tok"]:
        check_block(layer, block, reading.branches)


@torch.no_grad()
def hand_over_block(moe_layer: Block, block: nn.Module, reading: BlockReading, std: float) -> None:
    """Hand a host's MoE block to a layer on the meta device: its experts, its shared branch, its gate to the router.

    Stacks are not copied where they are stored as ours are. A shared branch that the host does not have starts without
    effect.
    """
    state = reading.state(block.state_dict())

    def part(name: str) -> dict[str, torch.Tensor]:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        return {key: tensor.contiguous() for key, tensor in own.items()}

    moe_layer.experts.load_state_dict(part("experts"), assign=True)
    materialise(moe_layer.gate, std)
    spec = replace(moe_layer.spec, num_experts_per_tok=reading.fields["num_experts_per_tok"])
    options = dict(reading.fields["router"])
    host_router = build("router", get_mechanism("router", options.pop("name")), options, spec)
    initialize_mechanisms(host_router, std)
    host_router.load_state_dict(part("gate"), strict=False)
    moe_layer.gate.start_from(host_router)
    if moe_layer.shared_expert is not None:
        materialise(moe_layer.shared_expert, std)
        if "num_shared_experts" in reading.fields:
            moe_layer.shared_expert.load_state_dict(part("shared_expert"))
        else:
            init.zeros_(moe_layer.shared_expert.down_proj.weight)


def adopt(dense: PreTrainedModel) -> tuple[dict[str, Any], Callable[[HfMoeForConditionalGeneration], None]]:
    """Return the `moe_config` that describes a MoE decoder, and a function that fills a model of that config.

        moe_config, copy = adopt(mixtral)
        model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=mixtral.config, moe_config=moe_config))
        copy(model)

    The logits of the filled model are the decoder's. Its own auxiliary loss and training noise are not taken over, and
    a bias on the choice stays as it is: name objectives and a router's options in `moe_config`.

    Args:
        dense: the MoE decoder's own `ForCausalLM`.

    Raises:
        ValueError: if the decoder has no MoE layer, or one that is more than this library's routers and experts, which
            its tensors tell, or its output once the model is filled.
    """
    readings = read_blocks(dense.base_model)
    if not readings:
        raise ValueError(f"{type(dense).__name__} has no MoE layer to adopt: upcycle it.")
    layers = decoder_layers(dense.base_model)

    def copy(model: HfMoeForConditionalGeneration) -> None:
        copy_host(model, dense)
        for layer_idx, moe_layer in model.moe_layers().items():
            block = getattr(layers[layer_idx], ffn_name(layers[layer_idx]))
            take_block(moe_layer, block, readings[layer_idx])

    return adopted_config(readings), copy
