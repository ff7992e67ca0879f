"""The parts of a multimodal model: its language model, and the towers and connectors around it."""

from torch import nn
from transformers import PreTrainedModel

from ..modeling.parts import HostParts, host_parts


PARTS = ("language_model", "towers")


def parts_of(model: nn.Module) -> HostParts | None:
    """Return the parts of a model; `None` where all of it is one part, and of encoder-decoders."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    parts = host_parts(model)
    return parts if parts.towers or parts.connectors else None


def part_of(parts: HostParts | None, key: str) -> str | None:
    """Return the part that module `key` lies in; `None` for a head, and where all of the model is one part."""
    if parts is None or key in parts.embeddings:
        return None
    return "towers" if parts.holder(key) is not None else "language_model"
