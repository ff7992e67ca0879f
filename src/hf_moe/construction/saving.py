"""Writing a model that fills most of the memory: its weights are never there twice."""

from pathlib import Path

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.moe_layer import MoELayer


LARGEST_SHARD = 5_000_000_000  # in bytes


def save_and_empty(model: HfMoeForConditionalGeneration, folder: Path) -> None:
    """Save a model as `save_pretrained` does, and leave it without weights in its MoE layers.

    Hosts such as Mixtral store every expert in tensors of its own. `save_pretrained` cuts all stacks at once, which
    takes the experts' memory a second time; here a layer's stacks are let go before the next layer's are cut.
    """
    weights = remove_tied_weights_from_state_dict(model.state_dict(), model)
    stored: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoELayer):
            own = [key for key in weights if key.startswith(f"{name}.")]
            stored |= revert_weight_conversion(model, {key: weights.pop(key) for key in own})
            layer.to("meta")
    stored |= revert_weight_conversion(model, weights)
    model.save_pretrained(folder, state_dict=stored, save_original_format=False, max_shard_size=LARGEST_SHARD)
