"""The parts of a multimodal model: its language model, and the towers and connectors around it."""

from torch import nn
from transformers import PreTrainedModel


PARTS = ("language_model", "towers")


def part_of(model: nn.Module, key: str) -> str | None:
    """Return the part that module `key` lies in; `None` for a head, and where all of the model is one part."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    whole, decoder = model.base_model, model.get_decoder()
    if decoder is whole or decoder is model:
        return None
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    if f"{key}.".startswith(names[decoder]):
        return "language_model"
    return "towers" if key.startswith(names[whole]) else None
