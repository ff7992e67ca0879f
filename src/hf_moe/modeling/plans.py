"""What stays float32, and how a model is split over devices: patterns of names that Transformers reads."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from .moe_layer import MoELayer


def float32_patterns(language_model: nn.Module) -> list[str]:
    """Return the patterns of the routers' tensors, which stay float32 in a model of lower precision.

    All but their counts, which are integers or of double precision. The routers that a host keeps are its own affair.
    FSDP2 asks for names with a star for the number of the layer.
    """
    patterns = set()
    for name, module in language_model.named_modules():
        if isinstance(module, MoELayer):
            before, _, after = (re.escape(part) for part in name.rpartition(f".{module.layer_idx}."))
            index = rf"(?:{module.layer_idx}|[^\d.]+)"
            counts = [re.escape(n) for n, b in module.gate.named_buffers() if b.dtype in (torch.long, torch.double)]
            unless = rf"(?!\.({'|'.join(counts)})$)" if counts else ""
            patterns.add(rf"{before}\.{index}\.{after}\.gate\b{unless}")
    return sorted(patterns)


def forget_replaced_parts(language_model: PreTrainedModel) -> None:
    """Drop the host's rules of tensor parallelism for the feed-forwards that MoE layers have replaced in every layer.

    Its rules name layers with a star for their number.
    """
    names = [name for name, _ in [*language_model.named_modules(), *language_model.named_parameters()]]
    known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    language_model.tp_plan = {name: style for name, style in language_model.tp_plan.items() if name in known}
