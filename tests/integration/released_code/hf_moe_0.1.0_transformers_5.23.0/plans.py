# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
# SHA-256 of the model's code: 778dc25f6fb5d870e908a416b0937af2bcba1bc34b99f0573abd152cd450f611
"""What stays float32, and how a model is split over devices: patterns of names that Transformers reads."""

import re

import torch
from torch import nn

from .moe_layer import MoELayer


def float32_patterns(language_model: nn.Module) -> list[str]:
    """Return the patterns of the routers' tensors, which stay float32 in a model of lower precision.

    All but their counts, which are integers or of double precision. The routers that a host keeps are its own affair. FSDP2 asks for names
    with a star for the number of the layer.
    """
    patterns = set()
    for name, module in language_model.named_modules():
        if isinstance(module, MoELayer):
            before, _, after = name.rpartition(f".{module.layer_idx}.")
            counts = [re.escape(n) for n, b in module.gate.named_buffers() if b.dtype in (torch.long, torch.double)]
            unless = rf"(?!\.({'|'.join(counts)})$)" if counts else ""
            patterns.add(
                rf"{re.escape(before)}\.(?:{module.layer_idx}|[^\d.]+)\.{re.escape(after)}\.gate\b{unless}"
            )
    return sorted(patterns)
