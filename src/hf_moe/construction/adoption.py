"""Adoption: a decoder that is a MoE already becomes this library's, with its routers and its experts.

What a block is, [`read_block`] tells from what it holds; whether the MoE layer that takes over its weights computes
the same, [`check_block`] tells. Layers that the host keeps dense stay dense.
"""

from collections.abc import Mapping
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
from ..modeling.registry import build
from .materialisation import materialise
from .moe_blocks import BlockReading, read_block


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
