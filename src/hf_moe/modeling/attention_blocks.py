"""Blocks in attention: tokens that see each other in both directions, in a decoder that is causal otherwise.

    token s sees token t        if t <= s, or s and t are of one block

A block is a run of tokens of one modality, such as an image, or of one id of a condition. Where that is the scale of
an image which is drawn scale by scale, a token sees what comes before the image, and all scales up to its own.

A block has to come in one call. Its keys are cached as any others, and a later token sees the whole of it; of a block
that is cut in two, the first part does not see the second. Its tokens see what follows them, so their next token is no
target of a loss.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_masks_for_generate

from ..configuration.configuration_hf_moe import MODALITIES
from .memory import cache_of
from .routing_context import RoutingContext


def block_ids(context: RoutingContext, name: str, device: torch.device) -> torch.Tensor:
    """Return the block of every token, (B, S), -1 for none: a token outside of blocks, or padding.

    Args:
        name: a modality, or a condition of tokens, whose id 0 is no block.

    Raises:
        ValueError: if it is a condition, and the call did not give it.
    """
    mask = context.token_mask.to(device)  # (B, S)
    if name in MODALITIES:
        kind = (context.modality_ids.to(device) == MODALITIES.index(name)).long()
    else:
        kind = context.condition(name, device).view(mask.shape)
    changes = F.pad(kind.diff(dim=1) != 0, (1, 0), value=True)
    return changes.long().cumsum(1).masked_fill((kind < 1) | ~mask, -1)


def masks_with_blocks(decoder: nn.Module, context: RoutingContext, name: str, inputs: dict[str, Any]) -> Any:
    """Return the attention mask of a decoder's call, or those by type of layer, in which blocks are whole.

    Args:
        name: see [`block_ids`].
        inputs: of the decoder, by name.

    Raises:
        ValueError: if the attention takes no such masks, or the call brings one that says already who sees whom.
    """
    given, cache, start = inputs.get("attention_mask"), cache_of(inputs), context.memory.cached_tokens
    if context.token_mask.shape[1] == 1:  # sees all there is
        return given
    if given is not None and not (isinstance(given, torch.Tensor) and given.dim() == 2):
        # `generate` makes the masks of a cache of fixed size; padding can be read off them.
        if cache is None or not cache.is_compileable or start:
            raise ValueError(
                f"moe_config.attention_blocks={name!r} makes the attention mask, and {type(decoder).__name__} got one "
                "that is made already: give a mask (rows, tokens), and a prompt as a whole. To a host that makes its "
                "own, as Gemma 3 does for images, leave attention_blocks out."
            )
        given = context.token_mask
    tokens = next(inputs[key] for key in ("inputs_embeds", "input_ids") if inputs.get(key) is not None)
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() == 3:  # of images; where there are four rows, the first is of text
        positions = positions[0] if len(positions) == 4 else None
    like = torch.empty(*tokens.shape[:2], 0, dtype=decoder.dtype, device=tokens.device)
    blocks = F.pad(block_ids(context, name, tokens.device), (start, 0), value=-1)  # (B, n + S)
    arguments = (decoder.config, like, given, cache, positions)  # Transformers 5.24 renames the fourth
    masks = create_masks_for_generate(*arguments, block_sequence_ids=blocks)
    made = masks.values() if isinstance(masks, dict) else [masks]
    if not any(mask is not None and len(mask.shape) == 4 for mask in made):
        raise ValueError(
            f"moe_config.attention_blocks={name!r} needs an attention that takes masks of any form, and that of "
            f"{type(decoder).__name__} with {decoder.config._attn_implementation!r} does not: set "
            "attn_implementation='sdpa', 'eager' or 'flex_attention', or choose another host."
        )
    return masks
