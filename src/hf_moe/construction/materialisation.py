"""Memory for modules that were made on the meta device."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..modeling.initialisation import initialize_mechanisms


def empty_model(
    model_class: Any, config: Any, dtype: torch.dtype | None = None, attn_implementation: Any = None
) -> Any:
    """Return a model on the meta device, with its structure and no weights."""
    with torch.device("meta"):
        return model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)


@torch.no_grad()
def materialise(module: nn.Module, std: float, device: torch.device | str = "cpu") -> None:
    """Give a module on the meta device memory, and its first values."""
    module.to_empty(device=device)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init.normal_(part.weight, mean=0.0, std=std)
            if part.bias is not None:
                init.zeros_(part.bias)
    initialize_mechanisms(module, std)


def check_materialised(model: nn.Module) -> None:
    """Refuse a model of which a part has no memory yet.

    Raises:
        ValueError: with the names.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ValueError(f"{len(empty)} tensors of the model were never filled, among them {empty[:3]}.")
