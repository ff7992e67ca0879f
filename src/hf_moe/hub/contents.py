"""What the tensors of a checkpoint are: the part that each belongs to, and what works on a token of each modality."""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..configuration import MoeConfig
from ..configuration.configuration_hf_moe import PLACE_FIELDS
from ..configuration.layer_maps import at_layer
from ..modeling.mechanisms import mechanism_names
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import HostParts, part_of
from ..modeling.routing import Experts
from .bundle import used_names
from .host_facts import modalities


GROUPS = (
    "vision tower", "audio tower", "connector", "objectives",
    "routers", "routed experts", "shared experts", "embeddings", "rest of the decoder",
)  # fmt: skip
DECODER = ("routers", "shared experts", "embeddings", "rest of the decoder")
# In the decoder the first that matches gives the group of a tensor; the others are known by structure.
DECODER_PATTERNS = {
    "routers": r"\.gate\.|\bshared_routing\.",
    "routed experts": r"\.experts\.",
    "shared experts": r"\.shared_experts?\.",
}

# The shapes of a model's parameters, by name.
Shapes = Mapping[str, Iterable[int]]


def bare_model(config: Any) -> HfMoeForConditionalGeneration:
    """Return the model of a checkpoint on the meta device without its mechanisms: its parts and buffers are known."""
    bare = copy.deepcopy(config)
    bare.moe_config = MoeConfig(layers=[])
    for name in PLACE_FIELDS.values():
        setattr(bare, name, None)
    connector = getattr(bare, "connector", None)
    if isinstance(connector, dict) and connector["name"] not in mechanism_names("connector"):
        # A user's own that is not installed: it lies where any other would.
        bare.connector = {"name": "mlp"}
    with torch.device("meta"):
        return HfMoeForConditionalGeneration(bare)


def whole_model(config: Any) -> HfMoeForConditionalGeneration | None:
    """Return the model of a checkpoint on the meta device; `None` where one of its mechanisms is not installed."""
    if any(name not in mechanism_names(kind) for kind, names in used_names(config).items() for name in names):
        return None
    with torch.device("meta"):
        return HfMoeForConditionalGeneration(copy.deepcopy(config))


def group_of(name: str, parts: HostParts) -> str:
    """Return the group, of [`GROUPS`], that a tensor belongs to."""
    if name.startswith("objectives."):
        return "objectives"
    part = part_of(name, parts)
    if part == "tower":
        served = parts.modalities[str(parts.holder(name))]
        return "audio tower" if set(served) == {"audio"} else "vision tower"
    if part in GROUPS:
        return part
    found = (group for group, pattern in DECODER_PATTERNS.items() if re.search(pattern, name))
    return next(found, "rest of the decoder")


def size(shape: Iterable[int]) -> int:
    """Return how many numbers a tensor of this shape holds."""
    return math.prod(shape)


def packed_weights(model: torch.nn.Module) -> dict[str, int]:
    """Return how many weights each of a model's experts has in packed buffers, by a name within them."""
    experts = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    return {f"{path}.packed": module.packed_weights for path, module in experts.items()}


def encoder_parameters(shapes: Shapes, parts: HostParts, config: Any) -> dict[str, int]:
    """Return the parameters of the towers and connectors that encode each modality."""
    found = dict.fromkeys(modalities(config), 0)
    for name, shape in shapes.items():
        if part_of(name, parts) not in ("tower", "connector"):
            continue
        holder = parts.holder(name)
        # A parameter beside the decoder, such as the embedding of a line's end, serves pictures and videos.
        served = ("image", "video") if holder is None else parts.modalities[holder]
        for modality in found:
            # Without a tower of its own, a video goes through the tower of pictures.
            alone = modality == "video" and not any("video" in names for names in parts.modalities.values())
            if modality in served or (alone and "image" in served):
                found[modality] += size(shape)
    return found


def expert_tensors(shapes: Shapes, parts: HostParts, layer: int, bank: str | None = None) -> list[str]:
    """Return the names of a layer's routed experts, stacked or one per expert as older files have them."""
    inside = re.compile(rf"\.{layer}\.([^0-9]*\.)?experts\.{re.escape(bank) + '[.]' if bank else ''}")
    return [name for name in shapes if inside.search(name) and group_of(name, parts) == "routed experts"]


def active_by_shapes(config: Any, shapes: Shapes, parts: HostParts) -> dict[str, int]:
    """Return the decoder's parameters at most at work on a token where not all mechanisms are installed.

    All count but the experts beyond `num_experts_per_tok` equal ones; of two banks the second is for what is seen.
    """
    moe = config.moe_config
    always = sum(size(shape) for name, shape in shapes.items() if group_of(name, parts) in DECODER)
    active = dict.fromkeys(modalities(config), always)
    for layer in config.moe_layers():
        banks = at_layer(moe.expert_banks, layer) or {}
        slots = at_layer(moe.num_experts_per_tok, layer)
        for modality in active:
            bank = list(banks)[-1 if modality in ("image", "video") else 0] if banks else None
            experts = at_layer(moe.num_experts, layer) if bank is None else banks[bank]["num_experts"]
            held = sum(size(shapes[name]) for name in expert_tensors(shapes, parts, layer, bank))
            active[modality] += min(slots, experts) * held // experts
    return active
