"""Adoption: a decoder that is a MoE already becomes this library's, with its routers and its experts.

Covers hosts whose block is a softmax top-k gate and stacked gated experts and nothing else: Mixtral, Qwen3-MoE,
OLMoE. Layers that the host keeps dense stay dense.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.host import decoder_layers, ffn_name, read_ffn
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from .upcycling import check_block, copy_host


ADOPTED = {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


def adopt(dense: PreTrainedModel) -> tuple[dict[str, Any], Callable[[HfMoeForConditionalGeneration], None]]:
    """Return the `moe_config` that describes a MoE decoder, and a function that fills a model of that config.

        moe_config, copy = adopt(mixtral)
        model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=mixtral.config, moe_config=moe_config))
        copy(model)

    The logits of the filled model are the decoder's. Its own auxiliary loss and training noise are not taken over:
    name objectives and a router's options in `moe_config`.

    Args:
        dense: the MoE decoder's own `ForCausalLM`.

    Raises:
        ValueError: if the decoder has no MoE layer, or one that is more than a softmax top-k gate and gated experts,
            which its tensors tell, or its output once the model is filled.
    """
    name = type(dense).__name__
    blocks: dict[int, nn.Module] = {}
    for layer_idx, layer in enumerate(decoder_layers(dense.base_model)):
        ffn = getattr(layer, ffn_name(layer))
        if read_ffn(ffn).layout is None:
            blocks[layer_idx] = ffn
    if not blocks:
        raise ValueError(f"{name} has no MoE layer to adopt: upcycle it.")
    for layer_idx, block in blocks.items():
        held = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
        if held != ADOPTED:
            raise ValueError(
                f"{name} cannot be adopted: the MoE block of layer {layer_idx} holds {sorted(held)}, where a top-k "
                f"gate and gated experts hold {sorted(ADOPTED)}."
            )
    gate: Any = next(iter(blocks.values())).gate
    # Mixtral always renormalises, and has no field for it.
    norm_topk_prob = getattr(gate, "norm_topk_prob", True)
    if norm_topk_prob and gate.top_k == 1:
        raise ValueError(
            f"{name} cannot be adopted: with one slot per token it renormalises its weight to 1, which leaves the "
            "gate without a gradient; the router 'top_k' keeps the probability."
        )
    moe_config = {
        "layers": list(blocks),
        "num_experts": gate.weight.shape[0],
        "num_experts_per_tok": gate.top_k,
        "router": {"name": "top_k", "norm_topk_prob": norm_topk_prob},
        "experts": {"name": "ffn"},
    }

    def copy(model: HfMoeForConditionalGeneration) -> None:
        copy_host(model, dense)
        with torch.no_grad():
            for layer_idx, moe_layer in model.moe_layers().items():
                moe_layer.load_state_dict(blocks[layer_idx].state_dict())
                if moe_layer.spec.num_experts_per_tok == gate.top_k:
                    check_block(moe_layer, blocks[layer_idx])

    return moe_config, copy
